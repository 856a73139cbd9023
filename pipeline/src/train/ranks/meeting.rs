//! How ranks find each other: rank 0 listens at MASTER_ADDR:MASTER_PORT until all others have come. Whoever comes and is no rank of this
//! program is sent away and changes nothing; a rank of another program, or of another number of ranks, ends the meeting.
//!
//! ```text
//! a rank to rank 0    magic 8 │ version 24, filled up with zeros │ rank u32 │ of u32        little-endian
//! rank 0 to a rank    magic 8, then frames
//! ```

use super::error::RankError;
use super::link::{Link, Patience};
use super::message::{Message, Next};
use super::{Place, Ranks};
use crate::run::{RUN_AGAIN, RunContext};
use crate::{Error, Result};
use potstill_cache::ErrorClass;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

/// What both sides begin with; its end is the protocol's version.
const MAGIC: [u8; 8] = *b"potrank1";
/// What rank 0 says when all have come.
const ALL_HERE: Message = Message::Word { next: Next::Step, prove: false };
const VERSION_BYTES: usize = 24;
const HELLO_BYTES: usize = MAGIC.len() + VERSION_BYTES + 8;
/// Between two looks for somebody who comes, or two tries to reach rank 0.
const LOOK: Duration = Duration::from_millis(20);
/// For one try to connect.
const TRY: Duration = Duration::from_secs(3);
/// Strangers that a person is told of.
const TOLD: usize = 3;

/// A meeting to come: rank 0 listens already.
#[derive(Debug)]
pub struct Meeting {
    place: Place,
    listener: Option<TcpListener>,
    patience: Patience,
}

impl Meeting {
    /// Opens a meeting at the place; with port 0 the system chooses one, which [`address`](Self::address) tells. Errors: rank 0 cannot
    /// listen there.
    pub fn open(place: Place) -> Result<Self> {
        Self::with(place, Patience::default())
    }

    pub(super) fn with(mut place: Place, patience: Patience) -> Result<Self> {
        let mut listener = None;
        if place.rank == 0 {
            let wrong = |source| RankError::Listen { address: place.address(), source };
            let bound = TcpListener::bind((place.host.as_str(), place.port)).map_err(wrong)?;
            let wrong = |source| RankError::Listen { address: place.address(), source };
            bound.set_nonblocking(true).map_err(wrong)?;
            place.port = bound.local_addr().map_err(|source| RankError::Listen { address: place.address(), source })?.port();
            listener = Some(bound);
        }
        Ok(Self { place, listener, patience })
    }

    /// Where rank 0 is looked for: host and port.
    pub fn address(&self) -> String {
        self.place.address()
    }

    /// Waits for all ranks. Errors: one does not come, or belongs to another run; a stop was asked for.
    pub fn meet(self, context: &RunContext) -> Result<Ranks> {
        let Self { place, listener, patience } = self;
        context.progress.begin_at("meeting ranks", "ranks", place.of.into(), 1);
        let ranks = match listener {
            Some(listener) => Host { place: &place, patience: &patience, context, told: 0 }.meet(&listener).map(Ranks::first)?,
            None => Ranks::other(place.clone(), join(&place, &patience, context)?),
        };
        context.progress.end();
        Ok(ranks)
    }
}

fn stopped() -> Error {
    Error::Interrupted { kept: "the ranks had not all met".into(), again: RUN_AGAIN }
}

/// Rank 0 while it waits.
struct Host<'a> {
    place: &'a Place,
    patience: &'a Patience,
    context: &'a RunContext,
    /// Strangers so far.
    told: usize,
}

impl Host<'_> {
    /// Links to ranks 1 … of - 1. Whoever has come already is told of a failure.
    fn meet(&mut self, listener: &TcpListener) -> Result<Vec<Link>> {
        let mut links = BTreeMap::new();
        match self.gather(listener, &mut links) {
            Ok(()) => {
                let links: Vec<Link> = links.into_values().collect();
                // Before that no rank goes on, so that whatever it fails with is heard by all.
                links.iter().try_for_each(|link| link.send(&ALL_HERE))?;
                Ok(links)
            }
            Err(error) => {
                let abort = Message::Abort { rank: 0, class: error.class(), sentence: error.to_string() };
                links.values().for_each(|link| drop(link.send(&abort)));
                Err(error)
            }
        }
    }

    fn gather(&mut self, listener: &TcpListener, links: &mut BTreeMap<u32, Link>) -> Result<()> {
        let deadline = Instant::now() + self.patience.meeting;
        while links.len() + 1 < self.place.of as usize {
            match listener.accept() {
                Ok((stream, from)) => match self.greet(stream, links) {
                    Ok(link) => {
                        self.context.progress.add(1);
                        links.insert(link.rank(), link);
                    }
                    Err(Greeting::Failed(error)) => return Err(error.into()),
                    Err(Greeting::Stranger(why)) => {
                        self.tell(&format!("{from} came to {} and is no rank: {why}", self.place.address()))
                    }
                },
                // Nobody there, or a connection that was given up before it was taken.
                Err(_) => thread::sleep(LOOK),
            }
            // A rank that has come and failed, or left, or was asked to stop.
            for link in links.values() {
                if let Some(error) = link.failure() {
                    return Err(error.into());
                }
            }
            if self.context.stopping() {
                return Err(links.values().find_map(Link::failure).map_or_else(stopped, Error::from));
            }
            if Instant::now() > deadline {
                let missing = (1..self.place.of).filter(|rank| !links.contains_key(rank)).map(|rank| rank.to_string());
                let (missing, seconds) = (missing.collect::<Vec<_>>().join(", "), self.patience.meeting.as_secs());
                return Err(RankError::Missing { of: self.place.of, missing, seconds }.into());
            }
        }
        Ok(())
    }

    fn tell(&mut self, sentence: &str) {
        self.told += 1;
        if self.told <= TOLD {
            self.context.warn(sentence);
        }
    }

    /// Hears who has come.
    fn greet(&self, mut stream: TcpStream, links: &BTreeMap<u32, Link>) -> std::result::Result<Link, Greeting> {
        let stranger = |e: io::Error| Greeting::Stranger(e.to_string());
        stream.set_nonblocking(false).map_err(stranger)?;
        let mut hello = [0; HELLO_BYTES];
        read_within(&mut stream, &mut hello, self.patience.handshake).map_err(stranger)?;
        let Some(hello) = Hello::of(&hello) else {
            return Err(Greeting::Stranger("its first bytes are not a rank's".into()));
        };
        stream.set_write_timeout(Some(self.patience.handshake)).map_err(stranger)?;
        stream.write_all(&MAGIC).map_err(stranger)?;
        let Hello { version, rank, of } = hello;
        let mine = own_version();
        let differences = if version != mine {
            Some(format!("it is potstill {}, rank 0 is {}", shown(&version), shown(&mine)))
        } else if of != self.place.of {
            Some(format!("it says that there are {of} ranks (WORLD_SIZE), rank 0 says {}", self.place.of))
        } else if rank == 0 || rank >= of {
            Some(format!("expected a rank from 1 to below {of}"))
        } else {
            links.contains_key(&rank).then(|| "there are two of it (RANK)".into())
        };
        if let Some(differences) = differences {
            let error = RankError::Other { rank, differences };
            let abort = Message::Abort { rank: 0, class: ErrorClass::Mismatch, sentence: error.to_string() };
            let _ = stream.write_all(&abort.frame());
            return Err(Greeting::Failed(error));
        }
        Link::new(rank, stream, self.context, self.patience).map_err(stranger)
    }
}

/// Why somebody who came is not among the ranks.
enum Greeting {
    /// That ends the meeting.
    Failed(RankError),
    /// That does not.
    Stranger(String),
}

/// Who a rank says it is.
struct Hello {
    version: [u8; VERSION_BYTES],
    rank: u32,
    of: u32,
}

impl Hello {
    fn of(bytes: &[u8; HELLO_BYTES]) -> Option<Hello> {
        let (magic, rest) = bytes.split_first_chunk::<8>()?;
        let (version, rest) = rest.split_first_chunk()?;
        let (rank, rest) = rest.split_first_chunk()?;
        let (of, _) = rest.split_first_chunk()?;
        (*magic == MAGIC).then(|| Hello { version: *version, rank: u32::from_le_bytes(*rank), of: u32::from_le_bytes(*of) })
    }
}

fn own_version() -> [u8; VERSION_BYTES] {
    let mut version = [0; VERSION_BYTES];
    version.iter_mut().zip(env!("CARGO_PKG_VERSION").bytes()).for_each(|(to, from)| *to = from);
    version
}

fn shown(version: &[u8]) -> String {
    String::from_utf8_lossy(version).trim_end_matches('\0').to_string()
}

/// A link to rank 0, which may not listen yet.
fn join(place: &Place, patience: &Patience, context: &RunContext) -> Result<Link> {
    let deadline = Instant::now() + patience.meeting;
    let mut stream = loop {
        if context.stopping() {
            return Err(stopped());
        }
        match connect(place) {
            Ok(stream) => break stream,
            Err(e) if Instant::now() > deadline => {
                let seconds = patience.meeting.as_secs();
                return Err(RankError::Unreachable { address: place.address(), seconds, why: e.to_string() }.into());
            }
            Err(_) => thread::sleep(LOOK),
        }
    };
    let stranger = |why: String| RankError::Stranger { address: place.address(), why };
    let failed = |e: io::Error| stranger(e.to_string());
    let hello = [MAGIC.as_slice(), &own_version(), &place.rank.to_le_bytes(), &place.of.to_le_bytes()].concat();
    stream.set_write_timeout(Some(patience.silence)).map_err(failed)?;
    stream.write_all(&hello).map_err(failed)?;
    let mut answer = [0; MAGIC.len()];
    read_within(&mut stream, &mut answer, patience.silence).map_err(failed)?;
    if answer != MAGIC {
        return Err(stranger("it answers in other bytes".into()).into());
    }
    let link = Link::new(0, stream, context, patience).map_err(failed)?;
    link.last(&ALL_HERE)?;
    Ok(link)
}

fn connect(place: &Place) -> io::Result<TcpStream> {
    let mut last = io::Error::other("the name stands for no address");
    for address in (place.host.as_str(), place.port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, TRY) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Fills `bytes` within a time, however slowly they come.
fn read_within(stream: &mut TcpStream, bytes: &mut [u8], within: Duration) -> io::Result<()> {
    let deadline = Instant::now() + within;
    let mut filled = 0;
    while filled < bytes.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(ErrorKind::TimedOut, format!("it did not say who it is within {within:?}")));
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => return Err(io::Error::new(ErrorKind::UnexpectedEof, "it closed the connection before it said who it is")),
            Ok(n) => filled += n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
