"""The short help of the commands with many options; without imports, so that it comes at once."""

from __future__ import annotations

_FIT = """usage: nsgd fit [options]

Train any LightningModule. Without options: a small network on handwritten digits, with NSGD.

  --model CLASS           Classifier (default), LanguageModel, or a class of yours, as mymodule.MyModel
  --model.OPTION VALUE    its options; Classifier has --model.net with mlp, simple-cnn, resnet-20, vit and more
  --data CLASS            Digits, HuggingFace, Characters, or a LightningDataModule of yours; not needed where the
                          model has data loaders of its own
  --data.OPTION VALUE     its options, as --data.path uoft-cs/cifar10 --data.batch_size 128
  --optimizer CLASS       NSGD, or any other, as torch.optim.AdamW; without it the model's own
  --optimizer.OPTION V    its options, as --optimizer.lr 0.1 --optimizer.k 20 --optimizer.gamma 0.1
  --damp.OPTION VALUE     damp the optimizer, the model's own too, as --damp.gamma 0.1; at the defaults --damp '{}'
  --lr_scheduler CLASS    a schedule of torch for --optimizer, as StepLR --lr_scheduler.step_size 10
  --refresh.samples N     with --optimizer.solver gradients or lanczos: samples that the directions come from (32)
  --trainer.max_epochs N  epochs (20); --trainer.OPTION is an option of Lightning's Trainer
  --trainer.callbacks+ C  a callback, as WriteAverages, which writes checkpoints of EMA and SWA weights
  --trainer.logger CLASS  CSVLogger (default), TensorBoardLogger, WandbLogger, or false
  --measure NAMES         measure on the way, any of sharpness,valley,quadratic,averaging, or all
  --measure_overhead X    gradients that each measurement may cost for each gradient of training (0.15)
  --seed_everything N     seed (0)
  --ckpt_path FILE        go on from a checkpoint
  --config FILE           any of these options from a YAML file
  --print_config          print all options as such a file, and do nothing

  nsgd fit --optimizer NSGD --optimizer.lr 0.5
  nsgd fit --model mymodule.MyModel --damp.gamma 0.1 --trainer.callbacks+ SharpnessMonitor
  nsgd fit --config lightning_logs/version_0/config.yaml --optimizer.lr 0.2

nsgd fit --optimizer.help NSGD shows the options of a class, nsgd fit --help all every option."""

_EVALUATE = """usage: nsgd {command} --ckpt_path FILE [options]

{what} a checkpoint of nsgd fit.

  --ckpt_path FILE      the checkpoint, in lightning_logs/version_N/checkpoints; averages of weights are in .../averages
  --config FILE         the options it was trained with: lightning_logs/version_N/config.yaml
  --data.OPTION VALUE   options of the data, where they differ from those
  --trainer.OPTION V    any option of Lightning's Trainer, as --trainer.accelerator gpu
{more}
  nsgd {command} --config lightning_logs/version_0/config.yaml --ckpt_path CHECKPOINT

nsgd {command} --help all shows every option."""

_PREDICTIONS = """\
  --predictions.path F  the file to write (predictions.csv): class and probabilities of each image; predictions.pt for
                        the outputs as they are, of a model whose predictions are no table
"""

_COMPARE = """usage: nsgd compare [STUDY] [options]

Train every method with every seed from the same weights on the same batches, and compare: tables and a report.

  STUDY                 digits, digits-32, digits-1024, cifar10-small, cifar10-paper, or a YAML file with any of the
                        options below; options come after it, and count. Without it digits, or what --data, --net
                        and --model say; with nothing at all digits-32 and digits-1024, on one page
  --out FOLDER          results and report (nsgd-compare); the same command again goes on where it stopped
  --jobs N              runs at a time, in as many processes (1)
  --threads N           threads of each run (1); they change the numbers, so they belong to the study
  --data CLASS          Digits, HuggingFace, Characters, or a LightningDataModule of yours, as mymodule.MyData;
                        --data.path NAME, --data.limit N, --data.batch_size N are options of HuggingFace
  --model CLASS         a LightningModule of yours, as mymodule.MyModel, or LanguageModel, in place of a network by its
                        name; --model.OPTION VALUE are its options
  --monitor NAME        what is compared, as the module logs it in validation (val_accuracy; with --model val_loss), and
                        --mode min or max, whichever is better
  --net NAME            mlp, simple-cnn, simple-cnn-root, resnet-20, resnet-32, resnet-56, resnet-32-plain, vgg-11, vit,
                        or mymodule:make_net, from (channels, height, width) and the number of classes to a module
  --methods LIST        any of sgd, sgd-momentum, nsgd, nsgd-momentum, nsgd-hessian, bulk-sgd, dom-sgd, random,
                        sgd-more, sgd-momentum-more, adamw, damped-adamw, sam, muon, soap, schedule-free, own (the
                        model's configure_optimizers), damped-own, or any optimizer by its class, as
                        '[sgd, {class_path: torch.optim.RMSprop}]'; the others are compared with the first
  --seeds N --epochs N  paired seeds, and epochs of each run
  --lr X                one learning rate for all; --settings.nsgd '{lr: 0.2, gamma: 0.3}' for one method's
  --schedule MAPPING    of all learning rates, as '{name: cosine, warmup: 0.05}'; constant without; and --weight_decay X
  --tune N              N quasi-random trials of each method first, by validation loss; --search gives ranges
  --sweep lr            also draw final loss and score against 9 learning rates (--sweep_points) of each method
  --target X            value of what is monitored whose cost is compared
  --measure LIST        measure along the first seeds: sharpness, valley, quadratic, averaging, or all
  --nsgd.OPTION VALUE   options of NSGD, as --nsgd.k 20 --nsgd.gamma 0.1 --nsgd.solver gradients
  --run N               make this run of the study alone, by its number from 0 on
  --launcher ray        make the runs as tasks of a Ray cluster
  --print_config        print all options as a YAML file, and do nothing

  nsgd compare
  nsgd compare cifar10-small --jobs 2 --data.path FOLDER
  nsgd compare --net mlp --methods '[sgd,nsgd,adamw]' --tune 12 --sweep lr --out tuned
  nsgd compare --model mymodule.MyModel --data mymodule.MyData --monitor val_acc --methods '[sgd,nsgd,adamw]'

nsgd compare --help all shows every option."""

_ESCAPE = """usage: nsgd escape [options]

Let walkers run SGD on a loss with two minima until they leave the sharp one, and compare with theory; then with the
step along one direction scaled, as NSGD scales it: a table and a report.

  --out FOLDER          results and report (nsgd-escape); the same command again goes on where it stopped
  --potential NAME      double-well (default), channel, or module:name of a function of torch, points (n, d) to losses
                        (n,), with --start, --goal and, where it is not straight between, --saddle
  --barrier X --skew X  height of the saddle, and how much sharper the left minimum is; --walls across the channel
  --lr LIST             learning rates ([0.02,0.01])
  --batch_sizes LIST    batch sizes at the first of them ([40,46,52,60]); the others' are scaled to its temperatures
  --noise X             variance of the gradient of one sample (1000)
  --gammas LIST         factors on the step along one direction ([1,0.75,0.5]), at --gamma_batch_size (10)
  --walkers N           walkers of each run (10,000)
  --steps N             most steps of each run (5,000)
  --seed N              seed of the noise (0)
  --config FILE         any of these options from a YAML file
  --print_config        print all options as such a file, and do nothing

  nsgd escape
  nsgd escape --potential channel --gammas '[1,0.5,0.25]' --out channel
  nsgd escape --potential wells:tilted --start '[-1.0]' --goal '[0.9]'

nsgd escape --help all shows every option."""

HELP = {
    "compare": _COMPARE,
    "escape": _ESCAPE,
    "fit": _FIT,
    "validate": _EVALUATE.format(command="validate", what="Evaluate, on the validation data,", more=""),
    "test": _EVALUATE.format(command="test", what="Evaluate, on the test data,", more=""),
    "predict": _EVALUATE.format(
        command="predict", what="Write what is predicted, for the test data, by", more=_PREDICTIONS
    ),
}

LIGHTNING = ("fit", "validate", "test", "predict")


def asks_short_help(argv: list[str]) -> bool:
    """Whether a command line asks for help, but not for that of everything."""
    return any(word in ("-h", "--help") for word in argv) and argv[-1] != "all"
