//! Which columns a shard has, derived from the cache's description and format version alone: names, types, encodings.
//!
//! Every list column has one entry for each token, so plain SQL can index them alike:
//!
//! ```text
//! input_ids       [ 5,   9,    4,          7,          2  ]
//! topk_ids        [ [],  [],   [7, 3, 1],  [2, 8, 4],  [] ]      entry 2 follows tokens 0..=2 and predicts input_ids[3] = 7
//! topk_logprobs   [ [],  [],   [l, l, l],  [l, l, l],  [] ]
//! tail_logprob    [ 0.0, 0.0,  t,          t,          0.0]      nothing kept: all probability is tail, ln 1 = 0
//! ```

use crate::{Description, IdEncoding, Selection, Values};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use parquet::basic::Encoding;
use parquet::schema::types::ColumnPath;
use std::sync::Arc;

/// Name of the value inside a list, as the Parquet specification has it.
pub(crate) const ELEMENT: &str = "element";
/// Name of the column of keys.
pub(crate) const KEY: &str = "key";

/// A column of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Column {
    /// The row's key, 32 hexadecimal digits.
    Key,
    /// Number of the conversation in its data.
    SeqId,
    /// What is kept of each distribution, in words. Since version 2.
    Selection,
    /// Most entries a position may keep.
    K,
    /// The tokens.
    InputIds,
    /// Kept ids of each token's distribution.
    TopkIds,
    /// Their log-probabilities.
    TopkLogprobs,
    /// Their logits, in place of log-probabilities.
    TopkLogits,
    /// ln Σ exp(logit) over the vocabulary, with logits.
    Logsumexp,
    /// Log-probability outside the kept ids.
    TailLogprob,
    /// Drawn ids.
    SampleIds,
    /// How often each was drawn.
    SampleCounts,
    /// ln Σ p^(1/T) at the declared temperature of this number.
    LseT(usize),
    /// The row's codec error, summed over positions. Since version 2.
    CodecKlSum,
    /// Its largest. Since version 2.
    CodecKlMax,
    /// Checksum of the row.
    Crc32,
}

/// How a column holds a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One value.
    Scalar,
    /// A value for each token.
    List,
    /// A list of values for each token.
    Nested,
}

/// The columns of one cache's shards.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layout {
    /// Version of the format.
    pub(crate) version: u32,
    /// What is kept.
    pub(crate) selection: Selection,
    /// The selection in words, as rows state it.
    pub(crate) selection_text: String,
    values: Values,
    temperatures: Vec<f32>,
    ids: IdEncoding,
}

impl Layout {
    pub(crate) fn of(description: &Description, version: u32) -> Self {
        Self {
            version,
            selection: description.selection,
            selection_text: description.selection.to_string(),
            values: description.values,
            temperatures: description.lse_temperatures.clone(),
            ids: description.id_encoding,
        }
    }

    /// Whether entries are kept exactly.
    pub(crate) fn has_head(&self) -> bool {
        self.selection.head() > 0
    }

    /// Whether entries are drawn.
    pub(crate) fn has_samples(&self) -> bool {
        self.selection.draws().is_some()
    }

    /// Whether the numbers of kept entries are logits.
    pub(crate) fn has_logits(&self) -> bool {
        self.has_head() && self.values == Values::LogitBf16
    }

    /// Number of declared temperatures.
    pub(crate) fn temperatures(&self) -> usize {
        self.temperatures.len()
    }

    /// The columns in file order.
    pub(crate) fn columns(&self) -> Vec<Column> {
        use Column::*;
        let mut columns = vec![Key, SeqId];
        if self.version >= 2 {
            columns.push(Selection);
        }
        columns.extend([K, InputIds]);
        match (self.has_head(), self.has_logits()) {
            (true, true) => columns.extend([TopkIds, TopkLogits, Logsumexp]),
            (true, false) => columns.extend([TopkIds, TopkLogprobs]),
            (false, _) => {}
        }
        columns.push(TailLogprob);
        if self.has_samples() {
            columns.extend([SampleIds, SampleCounts]);
        }
        columns.extend((0..self.temperatures()).map(LseT));
        if self.version >= 2 {
            columns.extend([CodecKlSum, CodecKlMax]);
        }
        columns.push(Crc32);
        columns
    }

    /// A column's name.
    pub(crate) fn name(&self, column: Column) -> String {
        match column {
            Column::Key => KEY.into(),
            Column::SeqId => "seq_id".into(),
            Column::Selection => "selection".into(),
            Column::K => "k".into(),
            Column::InputIds => "input_ids".into(),
            Column::TopkIds => "topk_ids".into(),
            Column::TopkLogprobs => "topk_logprobs".into(),
            Column::TopkLogits => "topk_logits".into(),
            Column::Logsumexp => "logsumexp".into(),
            Column::TailLogprob => "tail_logprob".into(),
            Column::SampleIds => "sample_ids".into(),
            Column::SampleCounts => "sample_counts".into(),
            // A dot would read as a path: T = 1.5 is lse_t1_5.
            Column::LseT(i) => format!("lse_t{}", self.temperatures.get(i).copied().unwrap_or_default()).replace('.', "_"),
            Column::CodecKlSum => "codec_kl_sum".into(),
            Column::CodecKlMax => "codec_kl_max".into(),
            Column::Crc32 => "crc32".into(),
        }
    }

    /// The Arrow schema of every shard.
    pub(crate) fn schema(&self) -> SchemaRef {
        let field = |column: Column| {
            let list = |inner: DataType| DataType::List(element(inner));
            let data_type = match column.shape() {
                Shape::Scalar => column.data_type(),
                Shape::List => list(column.data_type()),
                Shape::Nested => list(list(column.data_type())),
            };
            Field::new(self.name(column), data_type, false)
        };
        Arc::new(Schema::new(self.columns().into_iter().map(field).collect::<Vec<_>>()))
    }

    /// A column's path in the Parquet schema.
    pub(crate) fn path(&self, column: Column) -> ColumnPath {
        let inside: &[&str] = match column.shape() {
            Shape::Scalar => &[],
            Shape::List => &["list", ELEMENT],
            Shape::Nested => &["list", ELEMENT, "list", ELEMENT],
        };
        ColumnPath::new([self.name(column)].into_iter().chain(inside.iter().map(|part| part.to_string())).collect())
    }

    /// How a list column's values are laid out in a page.
    pub(crate) fn encoding(&self, column: Column) -> Encoding {
        match column {
            Column::InputIds if self.version == 1 => Encoding::DELTA_BINARY_PACKED,
            // Float is the one type whose bytes old readers can put together again.
            Column::InputIds | Column::TopkIds | Column::SampleIds | Column::SampleCounts if self.ids == IdEncoding::Plain => {
                Encoding::PLAIN
            }
            _ => Encoding::BYTE_STREAM_SPLIT,
        }
    }
}

impl Column {
    /// How the column holds a row.
    pub(crate) fn shape(self) -> Shape {
        use Column::*;
        match self {
            Key | SeqId | Selection | K | CodecKlSum | CodecKlMax | Crc32 => Shape::Scalar,
            InputIds | TailLogprob | Logsumexp | LseT(_) => Shape::List,
            TopkIds | TopkLogprobs | TopkLogits | SampleIds | SampleCounts => Shape::Nested,
        }
    }

    /// Type of its values.
    pub(crate) fn data_type(self) -> DataType {
        use Column::*;
        match self {
            Key | Selection => DataType::Utf8,
            SeqId => DataType::UInt64,
            K | SampleCounts => DataType::UInt16,
            InputIds | TopkIds | SampleIds | Crc32 => DataType::UInt32,
            TopkLogprobs | TopkLogits | Logsumexp | TailLogprob | LseT(_) | CodecKlSum | CodecKlMax => DataType::Float32,
        }
    }
}

/// The field inside a list.
pub(crate) fn element(inner: DataType) -> Arc<Field> {
    Arc::new(Field::new(ELEMENT, inner, false))
}
