//! A server in this process that plays an OpenAI-compatible endpoint: it judges by marks in the answers it is shown, and does whatever goes
//! wrong on demand.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// How much the judge of pairs likes whatever stands first; as in `scripts/make_judge_fixtures.py`.
const FIRST: f64 = 0.75;

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    pub headers: BTreeMap<String, String>,
    pub body: Value,
}

impl Request {
    /// All messages, one after the other.
    pub fn text(&self) -> String {
        let messages = self.body["messages"].as_array().unwrap();
        messages.iter().map(|m| m["content"].as_str().unwrap()).collect::<Vec<_>>().join("\n")
    }

    fn is_pair(&self) -> bool {
        self.text().starts_with("You compare.")
    }
}

/// What is answered.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// The connection ends after so many bytes of the body.
    pub cut: Option<usize>,
    /// What follows the body, so many times.
    pub more: Option<(Vec<u8>, usize)>,
}

impl Answer {
    pub fn of(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), cut: None, more: None }
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// What is done to an ordinary answer before it is sent; the number counts requests from 1.
type Twist = Box<dyn FnMut(u64, &Request, Answer) -> Answer + Send>;

struct Shared {
    requests: Mutex<Vec<Request>>,
    count: Mutex<u64>,
    twist: Mutex<Twist>,
}

/// The endpoint.
pub struct Server {
    shared: Arc<Shared>,
    pub base_url: String,
}

impl Server {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let base_url = format!("http://{}/v1", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            requests: Mutex::default(),
            count: Mutex::new(0),
            twist: Mutex::new(Box::new(|_, _, answer| answer)),
        });
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&theirs);
                std::thread::spawn(move || serve(&shared, stream));
            }
        });
        Self { shared, base_url }
    }

    /// Changes answers from now on.
    pub fn twist(&self, twist: impl FnMut(u64, &Request, Answer) -> Answer + Send + 'static) {
        *self.shared.twist.lock().unwrap() = Box::new(twist);
        *self.shared.count.lock().unwrap() = 0;
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.shared.requests.lock().unwrap())
    }
}

fn serve(shared: &Shared, stream: TcpStream) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let Some(request) = read(&mut reader) else { return };
    shared.requests.lock().unwrap().push(request.clone());
    let number = {
        let mut count = shared.count.lock().unwrap();
        *count += 1;
        *count
    };
    let answer = Answer::of(200, ordinary(&request).to_string()).with("content-type", "application/json");
    let answer = (shared.twist.lock().unwrap())(number, &request, answer);
    // Whoever asked may have gone away.
    let _ = send(stream, answer);
}

fn read(reader: &mut impl BufRead) -> Option<Request> {
    let mut first = String::new();
    reader.read_line(&mut first).ok()?;
    let path = first.split(' ').nth(1)?.to_string();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_string());
    }
    let mut body = vec![0; headers.get("content-length")?.parse().ok()?];
    reader.read_exact(&mut body).ok()?;
    Some(Request { path, headers, body: serde_json::from_slice(&body).ok()? })
}

fn send(mut stream: TcpStream, answer: Answer) -> std::io::Result<()> {
    let more = answer.more.as_ref().map_or(0, |(bytes, times)| bytes.len() * times);
    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", answer.status);
    head += &format!("content-length: {}\r\n", answer.body.len() + more);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    stream.write_all(&answer.body[..answer.cut.unwrap_or(answer.body.len())])?;
    if let Some((bytes, times)) = answer.more {
        (0..times).try_for_each(|_| stream.write_all(&bytes))?;
    }
    stream.flush()
}

/// The numbers in marks `<q=…>`, in their order.
fn marks(text: &str) -> Vec<f64> {
    text.split("<q=").skip(1).map(|rest| rest.split('>').next().unwrap().parse().unwrap()).collect()
}

/// A reply with this text and, where it has log-probabilities, those of two labels.
pub fn reply(model: &str, content: &str, logprobs: Option<[f64; 2]>) -> Value {
    let top = logprobs.map(|[m, big]| {
        let all = json!([{ "token": "m", "logprob": m, "bytes": [109] }, { "token": "M", "logprob": big }, { "token": "x", "logprob": -9.0 }]);
        json!({ "content": [{ "token": content, "logprob": m.max(big), "top_logprobs": all }] })
    });
    json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": format!("{model}-2026"), "system_fingerprint": "fp_1",
        "choices": [{ "index": 0, "message": { "role": "assistant", "content": content }, "finish_reason": "stop", "logprobs": top }],
        "usage": { "prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110 }
    })
}

/// What the endpoint answers when all is well: a choice, an answer or a grade.
fn ordinary(request: &Request) -> Value {
    let model = request.body["model"].as_str().unwrap();
    let text = request.text();
    if model == "tiny-student" {
        let said = request.body["messages"].as_array().unwrap().len();
        return reply(model, &format!(" Answer {said} to {} <q={}> ", text.lines().last().unwrap(), 3 + said), None);
    }
    let marks = marks(&text);
    if request.is_pair() {
        let odds = marks[0] - marks[1] + FIRST;
        // ln σ(x) and ln σ(−x), as a model would have them.
        let of = |x: f64| -(-x).exp().ln_1p();
        let wanted = request.body["logprobs"] == true;
        return reply(model, if odds > 0.0 { "m" } else { "M" }, wanted.then(|| [of(odds), of(-odds)]));
    }
    let second = text.starts_with("Grade the second");
    let grade = marks[usize::from(second)];
    let words = if grade < 0.0 { "I cannot say.".to_string() } else { format!("Good enough.\n\nRating: [[{grade}]]") };
    reply(model, &words, None)
}
