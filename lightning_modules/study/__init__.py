"""Studies: methods, seeds and read-outs, tuned alike, with paired statistics; and walkers that escape."""
