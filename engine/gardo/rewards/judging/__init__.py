"""Vision-language models as judges: what they are asked, what their answers mean, where they run.

questions.py  a question with pictures, its answer, and how a prompt is shown as data
templates.py  what each judge asks, and which reader its answer has
readers.py    answers -> values; what cannot be read is no value
base.py       the reward that asks: in process, or an OpenAI-compatible endpoint
local.py      a model in this process; qwen_vl.py is its pixels and tokens
"""
