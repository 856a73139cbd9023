//! Layers one after another, as the device computes with them. Owns what becomes of a layer's weights before and after its turn: resident
//! ones are where they are; streamed ones are let go of in the host's memory, and on a GPU come in while the layer before computes.

use super::decoder::Decoder;
use super::layer::Layer;
use candle_core::Result;

/// The layers of one walk.
pub(crate) struct Turns<'a> {
    decoder: &'a Decoder,
    #[cfg(feature = "cuda")]
    upload: Option<Upload<'a>>,
    #[cfg(feature = "cuda")]
    pace: Option<Pace>,
}

impl<'a> Turns<'a> {
    /// A walk from the first layer on; `streamed` weights come and go.
    pub(crate) fn new(decoder: &'a Decoder, streamed: bool) -> Result<Self> {
        let _ = streamed;
        Ok(Self {
            decoder,
            #[cfg(feature = "cuda")]
            upload: streamed.then(|| Upload::new(decoder)).transpose()?.flatten(),
            #[cfg(feature = "cuda")]
            pace: decoder.device().as_cuda_device().ok().map(Pace::new),
        })
    }

    /// Layer `i`, which comes after layer `i - 1`, ready to compute with.
    pub(crate) fn begin(&mut self, i: usize) -> Result<Layer> {
        #[cfg(feature = "cuda")]
        if let Some(upload) = &mut self.upload {
            return upload.begin(i);
        }
        Ok(self.decoder.layers[i].clone())
    }

    /// Said once everything of a layer was launched: what comes next may come in meanwhile. A GPU is left one layer behind at most.
    pub(crate) fn launched(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        {
            self.upload.as_mut().map_or(Ok(()), Upload::bring_next)?;
            self.pace.as_mut().map_or(Ok(()), Pace::launched)?;
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
use crate::cuda::staging::Pace;
#[cfg(feature = "cuda")]
use on_gpu::Upload;

#[cfg(feature = "cuda")]
mod on_gpu {
    use super::{Decoder, Layer};
    use crate::cuda::DeviceWeight;
    use crate::cuda::staging::{Ready, Reserved, Staging};
    use candle_core::{CudaDevice, Device, Result};

    /// A layer on its way.
    struct Next<'a> {
        number: usize,
        layer: Layer,
        /// The room that is to be filled; none where it is filled.
        ready: Option<Ready<'a>>,
    }

    /// Streamed layers on a GPU: one computes, the next comes in.
    pub(super) struct Upload<'a> {
        layers: &'a [Layer],
        device: CudaDevice,
        staging: Staging,
        next: Option<Next<'a>>,
    }

    impl<'a> Upload<'a> {
        /// `None` where the model is not on a GPU.
        pub(super) fn new(decoder: &'a Decoder) -> Result<Option<Self>> {
            let Device::Cuda(device) = decoder.device() else { return Ok(None) };
            let (device, staging) = (device.clone(), Staging::new(device)?);
            Ok(Some(Self { layers: &decoder.layers, device, staging, next: None }))
        }

        pub(super) fn begin(&mut self, i: usize) -> Result<Layer> {
            if self.next.as_ref().is_none_or(|next| next.number != i) {
                self.reserve(i)?;
            }
            self.bring_next()?;
            let layer = self.next.take().map(|next| next.layer);
            // Before this layer is launched, so that the next one need not wait for it.
            self.reserve(i + 1)?;
            layer.ok_or_else(|| candle_core::Error::Msg(format!("there is no layer {i}")))
        }

        /// Room for a layer, if there is such a one.
        fn reserve(&mut self, i: usize) -> Result<()> {
            let Some(stored) = self.layers.get(i) else { return Ok(()) };
            let (mut layer, mut reserved) = (stored.clone(), Reserved::new());
            for (linear, stored) in layer.linears_mut().into_iter().zip(stored.linears()) {
                let put = |bytes| reserved.room(bytes, &self.device);
                linear.placed = Some(DeviceWeight::with(&stored.weight, &self.device, put)?);
            }
            self.next = Some(Next { number: i, layer, ready: Some(self.staging.mark(reserved)?) });
            Ok(())
        }

        /// Fills the room that was asked for.
        pub(super) fn bring_next(&mut self) -> Result<()> {
            match self.next.as_mut().and_then(|next| next.ready.take()) {
                Some(ready) => self.staging.bring(&ready),
                None => Ok(()),
            }
        }
    }
}
