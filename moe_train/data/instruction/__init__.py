"""Instruction data: rows to conversations, conversations to token ids with a mask of what the loss counts."""

from moe_train.data.instruction.encoder import EncodedBatch, InstructionEncoder, InstructionOptions

__all__ = ["EncodedBatch", "InstructionEncoder", "InstructionOptions"]
