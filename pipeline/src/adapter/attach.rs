//! Owns putting a stored adapter on a model's linear layers, to compute with it. Refuses an adapter of another model's shapes, before
//! any of the model's weights is read.

use super::module::{self, Matrix};
use super::{AdapterError, Checked, load};
use crate::linear::Lora;
use crate::model::config::ModelConfig;
use crate::model::decoder::{Decoder, features};
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

/// A stored adapter whose every matrix has its place in a model.
#[derive(Debug)]
pub struct FittedAdapter {
    /// By layer and projection.
    factors: BTreeMap<(usize, usize), Lora>,
}

impl FittedAdapter {
    /// Reads an adapter folder for a model of these sizes. Errors: as [`load`], a layer that the model does not have, a matrix of another size.
    pub fn read(folder: &Path, config: &ModelConfig) -> Checked<Self> {
        let (adapter, matrices) = load(folder)?;
        let mut factors = BTreeMap::new();
        for (name, a) in &matrices {
            let Some((module, Matrix::A)) = module::parse(name) else { continue };
            let name_of_b = module::tensor_name(module, Matrix::B);
            // `load` has seen both matrices of each pair.
            let (Some(place), Some(b)) = (module::place(module), matrices.get(&name_of_b)) else { continue };
            let (outputs, inputs) = features(config, place.1);
            let wrong = |name: &str, expected: String, tensor: &Tensor| {
                let (path, found) = (folder.to_path_buf(), format!("{:?}", tensor.dims()));
                Err(AdapterError::Shape { path, name: name.to_string(), expected, found })
            };
            if place.0 >= config.layers {
                return wrong(name, format!("a layer of the model, which has {}", config.layers), a);
            }
            if a.dims() != [adapter.rank as usize, inputs] {
                return wrong(name, format!("[{}, {inputs}], as the model has it", adapter.rank), a);
            }
            if b.dims() != [outputs, adapter.rank as usize] {
                return wrong(&name_of_b, format!("[{outputs}, {}], as the model has it", adapter.rank), b);
            }
            factors.insert(place, Lora { a: a.clone(), b: b.clone(), scale: adapter.factor() });
        }
        Ok(Self { factors })
    }

    /// Puts it on the layers of the model whose sizes it was read for, on the model's device.
    pub fn put_on(self, decoder: &mut Decoder) -> candle_core::Result<()> {
        let device = decoder.device().clone();
        for ((layer, projection), lora) in self.factors {
            let layer = decoder.layers.get_mut(layer).map(|layer| layer.linears_mut());
            if let Some(linear) = layer.and_then(|linears| linears.into_iter().nth(projection)) {
                let (a, b) = (lora.a.to_device(&device)?, lora.b.to_device(&device)?);
                linear.lora = Some(Lora { a, b, ..lora });
            }
        }
        Ok(())
    }
}
