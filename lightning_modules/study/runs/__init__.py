"""The runs of a study, from the plan to the files that they leave."""
