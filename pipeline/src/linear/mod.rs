//! y = W x + b (+ LoRA), whatever the encoding of W.
