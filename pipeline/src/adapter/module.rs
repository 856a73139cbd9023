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

/// Layer and place in [`PROJECTIONS`] of `model.layers.N.MODULE`, when it is the name of such a linear layer.
pub(super) fn place(module: &str) -> Option<(usize, usize)> {
    let (layer, name) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let number: u16 = layer.parse().ok()?;
    let projection = PROJECTIONS.iter().position(|p| *p == name)?;
    (number.to_string() == layer).then_some((usize::from(number), projection))
}

/// The last part of MODULE of such a name.
pub(super) fn projection(module: &str) -> Option<&'static str> {
    place(module).and_then(|(_, projection)| PROJECTIONS[projection].split('.').nth(1))
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
