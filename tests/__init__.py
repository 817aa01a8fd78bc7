"""Makes `tests.reference` and `tests.distributed` importable, also from the processes that distributed tests start."""
