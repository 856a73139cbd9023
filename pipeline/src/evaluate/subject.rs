//! The model that is evaluated: a plain or merged folder, or a base with an adapter, its linear layers as stored or in NF4.

use crate::adapter::FittedAdapter;
use crate::kernel::Precision;
use crate::model::config::ModelConfig;
use crate::model::decoder::{Decoder, Holding};
use crate::run::RunContext;
use crate::student::Student;
use crate::{Error, Result, device};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How the linear layers are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum BasePrecision {
    /// NF4 below an adapter, as training held them; else as stored.
    #[default]
    Auto,
    /// NF4 with double quantisation (dense folders only).
    Nf4,
    /// As the folder stores them: dense, or AWQ.
    Stored,
}

/// What is evaluated.
#[derive(Debug, Clone, PartialEq)]
pub struct Subject {
    /// Model folder.
    pub student: PathBuf,
    /// Adapter folder (PEFT) to put on it.
    pub adapter: Option<PathBuf>,
    /// How its linear layers are held.
    pub base: BasePrecision,
    /// What the factors of products are rounded to; sums are f32 in any case.
    pub compute: Precision,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
}

impl Default for Subject {
    fn default() -> Self {
        let (student, compute) = (PathBuf::new(), Precision::F32);
        Self { student, adapter: None, base: BasePrecision::Auto, compute, device: "auto".into() }
    }
}

impl Subject {
    /// How the linear layers are held, with `auto` settled.
    pub fn held(&self) -> BasePrecision {
        match (self.base, &self.adapter) {
            (BasePrecision::Auto, Some(_)) => BasePrecision::Nf4,
            (BasePrecision::Auto, None) => BasePrecision::Stored,
            (asked, _) => asked,
        }
    }

    /// Reads it. Errors: a device that is not here, a folder that cannot be read, an adapter that does not fit, a stop.
    pub(crate) fn load(&self, context: &RunContext) -> Result<Student> {
        let device = device::pick(&self.device, context)?;
        let config = ModelConfig::from_folder(&self.student)?;
        let adapter = self.adapter.as_deref().map(|folder| FittedAdapter::read(folder, &config)).transpose()?;
        let holding = match self.held() {
            BasePrecision::Nf4 => Holding::Nf4,
            BasePrecision::Stored | BasePrecision::Auto => Holding::AsStored,
        };
        let mut decoder = Decoder::from_folder(&self.student, holding, self.compute, &device, context).map_err(Error::from)?;
        if let Some(adapter) = adapter {
            adapter.put_on(&mut decoder)?;
        }
        decoder.place(context)?;
        Ok(Student::of(decoder))
    }
}
