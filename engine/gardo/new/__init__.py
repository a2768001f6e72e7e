"""`gardo new`: a commented recipe made from a model, rewards and GPUs.

starts.yaml   sections of the recipes that ship, which a test compares
values.py     a recipe's values: model, panel, algorithm, a batch that splits, what makes it fit
text.py       values as YAML, with what the schema says of each field as its comment
write.py      the recipe's file, and its prompts where there are none
"""
