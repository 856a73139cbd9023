//! Safetensors files of a model folder, mapped and checked.
