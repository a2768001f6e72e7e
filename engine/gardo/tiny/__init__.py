"""The built-in tiny world: captioned pictures of coloured shapes, and real, tiny models of them.

world.py    draws scenes and captions; pure functions of a generator
models.py   builds the tiny models (FluxPipeline, StableDiffusion3Pipeline, DINOv3) from scratch
judges.py   the nets of its judges
make.py     the seeded script that trains them and writes `weights/` (python -m gardo.tiny.make)
weights/    what make.py wrote: bf16 safetensors in diffusers and transformers layout; numbers/ is
            a Flux that writes numbers of two digits, by `./run words make --small`
"""
