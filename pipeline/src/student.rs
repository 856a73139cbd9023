//! The NF4 + LoRA student.
