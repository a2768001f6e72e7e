"""Rewards outside the training process: in a worker of a run, or behind `gardo rewards serve`.

wire.py       what goes over the line: safetensors and JSON, no pickles
server.py     the HTTP service, one thread a reward
batching.py   what that thread takes at once
client.py     a reward that asks a server, and the calls it has in flight
calls.py      deadline, retries, circuit breaker
workers.py    servers that a run starts for itself, one a machine and name
"""
