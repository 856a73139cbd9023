//! Owns the names of adapted modules and of their tensors; refuses every other name.

use crate::model::layer::PROJECTIONS;

/// What PEFT puts before the model's own names.
pub(super) const FILE_PREFIX: &str = "base_model.model.";

/// Which matrix of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Matrix {
    /// A `[r, in]`.
    A,
    /// B `[out, r]`.
    B,
}

impl Matrix {
    /// `lora_A` or `lora_B`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Matrix::A => "lora_A",
            Matrix::B => "lora_B",
        }
    }

    /// The other one.
    pub(super) fn partner(self) -> Matrix {
        match self {
            Matrix::A => Matrix::B,
            Matrix::B => Matrix::A,
        }
    }
}

/// `model.layers.N.MODULE` from the name of such a linear layer, when it is one; gives the last part of MODULE.
pub(super) fn projection(module: &str) -> Option<&'static str> {
    let (layer, name) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let canonical = layer.parse::<u16>().is_ok_and(|n| n.to_string() == layer);
    let name = PROJECTIONS.into_iter().find(|p| *p == name)?;
    if canonical { name.split('.').nth(1) } else { None }
}

/// Splits `model.layers.N.MODULE.lora_A.weight` into the module's name and the matrix.
pub(super) fn parse(name: &str) -> Option<(&str, Matrix)> {
    let name = name.strip_suffix(".weight")?;
    let (module, matrix) = match (name.strip_suffix(".lora_A"), name.strip_suffix(".lora_B")) {
        (Some(module), _) => (module, Matrix::A),
        (_, Some(module)) => (module, Matrix::B),
        _ => return None,
    };
    projection(module).map(|_| (module, matrix))
}

/// The tensor's name inside the program.
pub(super) fn tensor_name(module: &str, matrix: Matrix) -> String {
    format!("{module}.{}.weight", matrix.name())
}
