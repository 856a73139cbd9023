//! One connection between two ranks. Two threads serve it: one reads, so that a failure or a stop elsewhere is heard in the middle of a
//! pass; one gives signs of life, so that a slow evaluation and a dead machine can be told apart. Refuses to wait for ever: what is silent
//! for too long is gone.

use super::error::RankError;
use super::message::{Message, Next, Part};
use crate::run::RunContext;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long is waited for what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// For all ranks to come.
    pub meeting: Duration,
    /// For whoever connects to say who it is.
    pub handshake: Duration,
    /// Between two signs of life.
    pub pulse: Duration,
    /// Without one, until a rank counts as gone; also for a peer to take what is sent.
    pub silence: Duration,
    /// For the other side to close, at the end.
    pub farewell: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            meeting: Duration::from_secs(600),
            handshake: Duration::from_secs(5),
            pulse: Duration::from_secs(2),
            silence: Duration::from_secs(30),
            farewell: Duration::from_secs(5),
        }
    }
}

/// How often a stop is looked for.
const LOOK: Duration = Duration::from_millis(50);
/// Messages that wait to be taken; more than any rank sends unasked.
const INBOX: usize = 16;
/// What is wrong with more of them.
const TOO_MUCH: &str = "it sent more than it was asked for";

/// A connection to another rank.
#[derive(Debug)]
pub(super) struct Link {
    /// The other rank.
    rank: u32,
    stream: Arc<Mutex<TcpStream>>,
    inbox: Receiver<Result<Message, RankError>>,
    /// Taken from there while a failure was looked for.
    early: RefCell<VecDeque<Message>>,
    /// The thread that gives signs of life ends when this goes.
    pulse: Option<Sender<()>>,
    farewell: Duration,
    silence: Duration,
}

impl Link {
    /// Serves a stream to `rank`, after the handshake. Stops are shared with `context` both ways.
    pub(super) fn new(rank: u32, stream: TcpStream, context: &RunContext, patience: &Patience) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience.silence))?;
        stream.set_write_timeout(Some(patience.silence))?;
        let (reading, writing) = (stream.try_clone()?, Arc::new(Mutex::new(stream)));
        let (letters, inbox) = sync_channel(INBOX);
        let (pulse, ended) = channel();
        let (heard, own, silence) = (context.clone(), context.clone(), patience.silence);
        thread::Builder::new()
            .name(format!("from rank {rank}"))
            .spawn(move || listen(rank, reading, &letters, &heard, silence))?;
        let (shared, every) = (Arc::clone(&writing), patience.pulse);
        thread::Builder::new().name(format!("to rank {rank}")).spawn(move || beat(&shared, &ended, &own, every))?;
        Ok(Self {
            rank,
            stream: writing,
            inbox,
            early: RefCell::default(),
            pulse: Some(pulse),
            farewell: patience.farewell,
            silence,
        })
    }

    /// The other rank.
    pub(super) fn rank(&self) -> u32 {
        self.rank
    }

    /// Sends. Errors: the other side is gone, or takes nothing; what it said before it went, if it did.
    pub(super) fn send(&self, message: &Message) -> Result<(), RankError> {
        write(&self.stream, message).map_err(|e| self.last_words().unwrap_or_else(|| self.gone(in_words(&e, self.silence))))
    }

    /// The next message. Errors: the other side has failed, is gone, or talks nonsense.
    pub(super) fn receive(&self) -> Result<Message, RankError> {
        if let Some(message) = self.early.borrow_mut().pop_front() {
            return Ok(message);
        }
        self.inbox.recv().unwrap_or_else(|_| Err(self.gone("it has closed the connection".into())))
    }

    /// What the other side has failed with by now, if it has.
    pub(super) fn failure(&self) -> Option<RankError> {
        let mut early = self.early.borrow_mut();
        loop {
            match self.inbox.try_recv().ok()? {
                Ok(message) if early.len() < INBOX => early.push_back(message),
                Ok(_) => return Some(self.gone(TOO_MUCH.into())),
                Err(error) => return Some(error),
            }
        }
    }

    /// What the other side failed with, if it said so.
    fn last_words(&self) -> Option<RankError> {
        let deadline = Instant::now() + self.farewell;
        while let Ok(letter) = self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            if let Err(error) = letter {
                return Some(error);
            }
        }
        None
    }

    fn gone(&self, why: String) -> RankError {
        RankError::Gone { rank: self.rank, why }
    }

    fn unexpected<T>(&self, expected: &str, found: &Message) -> Result<T, RankError> {
        Err(self.gone(format!("it sent {}, expected {expected}", found.name())))
    }

    /// The next message, an identity.
    pub(super) fn identity(&self) -> Result<Vec<u8>, RankError> {
        match self.receive()? {
            Message::Identity(json) => Ok(json),
            other => self.unexpected("an identity", &other),
        }
    }

    /// The next message, a start.
    pub(super) fn start(&self) -> Result<Option<u64>, RankError> {
        match self.receive()? {
            Message::Start(step) => Ok(step),
            other => self.unexpected("a start", &other),
        }
    }

    /// The next message, an id.
    #[cfg(feature = "cuda")]
    pub(super) fn id(&self) -> Result<[u8; 128], RankError> {
        match self.receive()? {
            Message::Id(id) => Ok(id),
            other => self.unexpected("an id", &other),
        }
    }

    /// The next message, a word.
    pub(super) fn word(&self) -> Result<(Next, bool), RankError> {
        match self.receive()? {
            Message::Word { next, prove } => Ok((next, prove)),
            other => self.unexpected("a word", &other),
        }
    }

    /// The next message, a proof.
    pub(super) fn proof(&self) -> Result<[u8; 32], RankError> {
        match self.receive()? {
            Message::Proof(digest) => Ok(digest),
            other => self.unexpected("a proof", &other),
        }
    }

    /// The next message, a part.
    pub(super) fn part(&self) -> Result<Part, RankError> {
        match self.receive()? {
            Message::Part(part) => Ok(part),
            other => self.unexpected("a part", &other),
        }
    }

    /// The next message, sums.
    pub(super) fn sums(&self) -> Result<Option<[f64; 3]>, RankError> {
        match self.receive()? {
            Message::Sums(sums) => Ok(sums),
            other => self.unexpected("sums", &other),
        }
    }

    /// The next message, so many values.
    pub(super) fn values(&self, count: usize) -> Result<Vec<f32>, RankError> {
        match self.receive()? {
            Message::Values(values) if values.len() == count => Ok(values),
            Message::Values(values) => Err(self.gone(format!("it sent {} values, expected {count}", values.len()))),
            other => self.unexpected("values", &other),
        }
    }

    /// The next message, which says that all is written, or that nothing comes any more.
    pub(super) fn last(&self, expected: &Message) -> Result<(), RankError> {
        match self.receive()? {
            found if found == *expected => Ok(()),
            other => self.unexpected(expected.name(), &other),
        }
    }
}

impl Drop for Link {
    /// Closes so that the other side gets all that was sent: bytes that nobody has read when a socket closes would take it with them.
    fn drop(&mut self) {
        self.pulse = None;
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = stream.shutdown(Shutdown::Write);
        let deadline = Instant::now() + self.farewell;
        while self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok() {}
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn write(stream: &Mutex<TcpStream>, message: &Message) -> io::Result<()> {
    let frame = message.frame();
    io::Write::write_all(&mut *stream.lock().unwrap_or_else(PoisonError::into_inner), &frame)
}

/// Reads until the other side closes. What ends the connection before a farewell gives up the pass under way.
fn listen(
    rank: u32,
    mut stream: TcpStream,
    letters: &SyncSender<Result<Message, RankError>>,
    context: &RunContext,
    silence: Duration,
) {
    let gone = |why: String| RankError::Gone { rank, why };
    loop {
        let letter = match Message::read(&mut stream) {
            Ok(Message::Alive) => continue,
            Ok(Message::Stop) => {
                context.halt();
                continue;
            }
            Ok(Message::Abort { rank, class, sentence }) => Err(RankError::Ended { rank, class, sentence }),
            Ok(message @ (Message::Done | Message::Bye)) => {
                let _ = letters.try_send(Ok(message));
                return drain(stream);
            }
            Ok(message) => Ok(message),
            Err(e) => Err(gone(in_words(&e, silence))),
        };
        let failed = letter.is_err();
        let sent = letters.try_send(letter);
        if let Err(TrySendError::Full(_)) = sent {
            // Waits for room: the taker finds it behind what it holds.
            let _ = letters.send(Err(gone(TOO_MUCH.into())));
        }
        if failed || sent.is_err() {
            // After the reason, so that whoever sees this finds that.
            context.halt();
            return drain(stream);
        }
    }
}

/// Reads to the end without looking, so that nothing that the other side sends is in the way of what was sent to it.
fn drain(mut stream: TcpStream) {
    let _ = io::copy(&mut stream, &mut io::sink());
}

fn in_words(error: &io::Error, silence: Duration) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe => "it has closed the connection".into(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => format!("it said nothing for {silence:?}"),
        io::ErrorKind::InvalidData => format!("it sent {error}"),
        _ => error.to_string(),
    }
}

/// Gives signs of life, and passes on that a stop was asked for, until the link is dropped.
fn beat(stream: &Mutex<TcpStream>, ended: &Receiver<()>, context: &RunContext, every: Duration) {
    let (mut last, mut said) = (Instant::now(), false);
    while ended.recv_timeout(LOOK.min(every)) == Err(RecvTimeoutError::Timeout) {
        if context.stopping() && !said {
            said = true;
            let _ = write(stream, &Message::Stop);
        }
        if last.elapsed() >= every {
            last = Instant::now();
            // Where it cannot be written, reading fails too.
            let _ = write(stream, &Message::Alive);
        }
    }
}
