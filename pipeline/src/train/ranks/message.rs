//! What ranks say to each other, as bytes. Refuses any byte that is not of a message known here: a length is held against what its kind
//! may have before anything is read.
//!
//! ```text
//! frame     kind u8 │ length u32 │ payload of so many bytes                 all numbers little-endian
//! ```

use potstill_cache::ErrorClass;
use std::io::{self, Read};

/// Values of a gradient in one frame, at most.
pub(super) const CHUNK: usize = 1 << 18;
/// Bytes of a frame before its payload.
const HEADER: usize = 5;
/// Most bytes of an identity.
const MAX_IDENTITY: usize = 1 << 18;
/// Most bytes of a sentence.
const MAX_SENTENCE: usize = 1 << 12;

/// What comes after a step, in rank 0's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::train) enum Next {
    /// A step.
    Step,
    /// The end: the run is over.
    End,
    /// The end: a stop was asked for.
    Stop,
}

/// A rank's part of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Part {
    /// The step, counted from 0.
    pub step: u64,
    /// Scored positions of the whole step, as this rank counts them.
    pub scored: u64,
    /// Tokens of the whole step, as this rank counts them.
    pub tokens: u64,
    /// total, kd and ce, this rank's share of the mean; `None` where its pass was given up.
    pub sums: Option<[f64; 3]>,
}

/// A message.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Message {
    /// Nothing but that the rank lives.
    Alive,
    /// A stop was asked for: give up the pass under way.
    Stop,
    /// The rank has failed.
    Abort {
        /// The rank.
        rank: u32,
        /// The class of its error.
        class: ErrorClass,
        /// Its error.
        sentence: String,
    },
    /// Which run a rank means: JSON.
    Identity(Vec<u8>),
    /// The checkpoint to go on from, by its step.
    Start(Option<u64>),
    /// What comes next, and whether the ranks' adapters are compared first.
    Word {
        /// What comes next.
        next: Next,
        /// Whether they are compared.
        prove: bool,
    },
    /// BLAKE3 of a rank's adapter.
    Proof([u8; 32]),
    /// A rank's part of a step.
    Part(Part),
    /// The sums of all parts; `None` where the step was given up.
    Sums(Option<[f64; 3]>),
    /// A stretch of the gradients.
    Values(Vec<f32>),
    /// All is written.
    Done,
    /// Nothing comes after this.
    Bye,
    /// What the ranks' GPUs find each other by.
    Id([u8; 128]),
}

impl Message {
    fn kind(&self) -> u8 {
        match self {
            Message::Alive => 0,
            Message::Stop => 1,
            Message::Abort { .. } => 2,
            Message::Identity(_) => 3,
            Message::Start(_) => 4,
            Message::Word { .. } => 5,
            Message::Proof(_) => 6,
            Message::Part(_) => 7,
            Message::Sums(_) => 8,
            Message::Values(_) => 9,
            Message::Done => 10,
            Message::Bye => 11,
            Message::Id(_) => 12,
        }
    }

    /// What it is, for sentences.
    pub(super) fn name(&self) -> &'static str {
        const NAMES: [&str; 13] = [
            "a sign of life",
            "a stop",
            "a failure",
            "an identity",
            "a start",
            "a word",
            "a proof",
            "a part",
            "sums",
            "values",
            "an end",
            "a farewell",
            "an id",
        ];
        NAMES[usize::from(self.kind())]
    }

    /// The bytes of its frame. A sentence that is too long loses its end.
    pub(super) fn frame(&self) -> Vec<u8> {
        let mut frame = vec![self.kind(), 0, 0, 0, 0];
        match self {
            Message::Alive | Message::Stop | Message::Done | Message::Bye => {}
            Message::Abort { rank, class, sentence } => {
                frame.extend(rank.to_le_bytes());
                frame.push(code(*class));
                frame.extend(&sentence.as_bytes()[..sentence.floor_char_boundary(MAX_SENTENCE)]);
            }
            Message::Identity(json) => frame.extend(json),
            Message::Start(step) => put_number(&mut frame, *step),
            Message::Word { next, prove } => frame.extend([*next as u8, u8::from(*prove)]),
            Message::Proof(digest) => frame.extend(digest),
            Message::Id(id) => frame.extend(id),
            Message::Part(Part { step, scored, tokens, sums }) => {
                [step, scored, tokens].into_iter().for_each(|n| frame.extend(n.to_le_bytes()));
                put_sums(&mut frame, sums);
            }
            Message::Sums(sums) => put_sums(&mut frame, sums),
            Message::Values(values) => frame.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        }
        let length = (frame.len() - HEADER) as u32;
        frame[1..HEADER].copy_from_slice(&length.to_le_bytes());
        frame
    }

    /// Reads one message. Errors: the stream's; `InvalidData` for bytes that are none.
    pub(super) fn read(stream: &mut impl Read) -> io::Result<Message> {
        let mut header = [0; HEADER];
        stream.read_exact(&mut header)?;
        let [kind, length @ ..] = header;
        let length = u32::from_le_bytes(length) as usize;
        let most = match kind {
            0 | 1 | 10 | 11 => 0,
            2 => 5 + MAX_SENTENCE,
            3 => MAX_IDENTITY,
            4 => 9,
            5 => 2,
            6 => 32,
            7 => 49,
            8 => 25,
            9 => 4 * CHUNK,
            12 => 128,
            _ => return Err(wrong(format!("a message of the unknown kind {kind}"))),
        };
        if length > most {
            return Err(wrong(format!("a message of kind {kind} with {length} bytes, expected at most {most}")));
        }
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload)?;
        Message::of(kind, payload).ok_or_else(|| wrong(format!("a message of kind {kind} that cannot be read")))
    }

    fn of(kind: u8, payload: Vec<u8>) -> Option<Message> {
        let mut rest = Bytes(&payload);
        let message = match kind {
            0 => Message::Alive,
            1 => Message::Stop,
            2 => {
                let (rank, class) = (u32::from_le_bytes(rest.take()?), class(rest.byte()?)?);
                let sentence = String::from_utf8(std::mem::take(&mut rest.0).to_vec()).ok()?;
                Message::Abort { rank, class, sentence }
            }
            3 => return Some(Message::Identity(payload)),
            4 => {
                Message::Start(rest.present()?.then(|| rest.take().map(u64::from_le_bytes)).map_or(Some(None), |n| n.map(Some))?)
            }
            5 => {
                let next = [Next::Step, Next::End, Next::Stop].into_iter().nth(usize::from(rest.byte()?))?;
                Message::Word { next, prove: rest.present()? }
            }
            6 => Message::Proof(rest.take()?),
            7 => {
                let [step, scored, tokens] = [rest.take()?, rest.take()?, rest.take()?].map(u64::from_le_bytes);
                Message::Part(Part { step, scored, tokens, sums: rest.sums()? })
            }
            8 => Message::Sums(rest.sums()?),
            9 => {
                let (values, end) = std::mem::take(&mut rest.0).as_chunks();
                rest = Bytes(end);
                Message::Values(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
            }
            10 => Message::Done,
            11 => Message::Bye,
            12 => Message::Id(rest.take()?),
            _ => return None,
        };
        rest.0.is_empty().then_some(message)
    }
}

fn put_number(frame: &mut Vec<u8>, number: Option<u64>) {
    frame.push(u8::from(number.is_some()));
    frame.extend(number.into_iter().flat_map(u64::to_le_bytes));
}

fn put_sums(frame: &mut Vec<u8>, sums: &Option<[f64; 3]>) {
    frame.push(u8::from(sums.is_some()));
    frame.extend(sums.iter().flatten().flat_map(|sum| sum.to_le_bytes()));
}

/// A payload's bytes that were not read yet.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take().map(|[byte]| byte)
    }

    /// A 0 or a 1.
    fn present(&mut self) -> Option<bool> {
        match self.byte()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    fn sums(&mut self) -> Option<Option<[f64; 3]>> {
        if !self.present()? {
            return Some(None);
        }
        Some(Some([self.take()?, self.take()?, self.take()?].map(f64::from_le_bytes)))
    }
}

const CLASSES: [ErrorClass; 6] = [
    ErrorClass::Runtime,
    ErrorClass::Usage,
    ErrorClass::Integrity,
    ErrorClass::Locked,
    ErrorClass::Mismatch,
    ErrorClass::Interrupted,
];

fn code(class: ErrorClass) -> u8 {
    CLASSES.iter().position(|known| *known == class).unwrap_or(0) as u8
}

fn class(code: u8) -> Option<ErrorClass> {
    CLASSES.get(usize::from(code)).copied()
}

fn wrong(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    fn each() -> Vec<Message> {
        let part = Part { step: 1, scored: 2, tokens: u64::MAX, sums: None };
        let abort = |class| Message::Abort { rank: 3, class, sentence: "größer".into() };
        let mut all: Vec<Message> = CLASSES.into_iter().map(abort).collect();
        all.extend([
            Message::Alive,
            Message::Stop,
            Message::Identity(b"{}".to_vec()),
            Message::Start(None),
            Message::Start(Some(7)),
        ]);
        let words = [Next::Step, Next::End, Next::Stop].into_iter().flat_map(|next| [(next, true), (next, false)]);
        all.extend(words.map(|(next, prove)| Message::Word { next, prove }));
        all.extend([
            Message::Proof([9; 32]),
            Message::Part(part),
            Message::Part(Part { sums: Some([0.5, -1.0, 1e300]), ..part }),
        ]);
        all.extend([Message::Sums(None), Message::Sums(Some([1.0, 2.0, 3.0])), Message::Values(vec![1.5; CHUNK])]);
        all.extend([Message::Values(Vec::new()), Message::Done, Message::Bye, Message::Id([200; 128])]);
        all
    }

    #[test]
    fn what_is_written_is_read() {
        for message in each() {
            let frame = message.frame();
            let mut rest = frame.as_slice();
            assert_eq!(Message::read(&mut rest).unwrap(), message);
            assert!(rest.is_empty());
            // Cut anywhere, or with a byte too many that its length owns to, it is an error.
            for cut in [0, 3, HEADER, frame.len() - 1] {
                assert!(cut >= frame.len() || Message::read(&mut &frame[..cut]).is_err(), "{} cut at {cut}", message.name());
            }
            let mut longer = [frame.as_slice(), &[7]].concat();
            let length = (longer.len() - HEADER) as u32;
            longer[1..HEADER].copy_from_slice(&length.to_le_bytes());
            let more = Message::read(&mut longer.as_slice());
            assert!(matches!(message, Message::Abort { .. } | Message::Identity(_)) || more.is_err(), "{}", message.name());
        }
        let long = Message::Abort { rank: 0, class: ErrorClass::Runtime, sentence: "ü".repeat(MAX_SENTENCE) };
        let Message::Abort { sentence, .. } = Message::read(&mut long.frame().as_slice()).unwrap() else { panic!() };
        assert_eq!(sentence, "ü".repeat(MAX_SENTENCE / 2));
    }

    #[test]
    fn no_bytes_are_too_hostile() {
        // A length is refused before a byte is set aside for it.
        for kind in 0..=255 {
            let error = Message::read(&mut [[kind].as_slice(), &[255; 4]].concat().as_slice()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{kind}");
        }
        let mut random = ChaCha8Rng::seed_from_u64(3);
        for _ in 0..20_000 {
            let length = random.next_u32() % 60;
            let mut bytes = vec![(random.next_u32() % 14) as u8];
            bytes.extend(length.to_le_bytes());
            bytes.extend((0..length).map(|_| (random.next_u32() % 5) as u8));
            // Whatever was taken for a message has exactly these bytes.
            if let Ok(message) = Message::read(&mut bytes.as_slice()) {
                assert_eq!(message.frame(), bytes);
            }
        }
    }
}
