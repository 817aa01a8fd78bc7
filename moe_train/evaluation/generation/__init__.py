"""Text from a trained model: sampling, stopping, a loop with a key-value cache, prompts spread over ranks."""
