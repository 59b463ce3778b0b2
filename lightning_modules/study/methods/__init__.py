"""The methods that a study compares: recipe (what one is), built_in (the table), any_optimizer, own, schedule, muon."""

from lightning_modules.study.methods.built_in import RECIPES as RECIPES
from lightning_modules.study.methods.prepare import prepare as prepare
from lightning_modules.study.methods.recipe import Method as Method
from lightning_modules.study.methods.recipe import NSGDOptions as NSGDOptions
from lightning_modules.study.methods.recipe import Recipe as Recipe
from lightning_modules.study.methods.recipe import Settings as Settings
from lightning_modules.study.methods.schedule import Schedule as Schedule
