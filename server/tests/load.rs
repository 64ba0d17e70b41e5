//! The built server under load: real sockets, and clients that leave, dawdle, blunder and guess.
//!
//! Input: the demo pair. `FORETOKEN_LOAD_SECONDS` says how long (default 3). Every text must be the
//! one that `foretoken run` prints for its seed without a draft. Not here: single answers (they are
//! tested beside the handlers); `foretoken load` ([`generator`]).
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of a test binary for no test")]
#![allow(clippy::print_stdout, reason = "tests print what they measured beside what is allowed")]

#[path = "load/generator.rs"]
mod generator;

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use testkit::Rng;

const CLIENTS: usize = 64;
const KEY: &str = "the-key-of-the-load-test";
/// A place in the queue is soon free, so a client that is refused comes again.
const RETRY: Duration = Duration::from_millis(50);
/// An answer that takes longer is lost: all work at once takes far less.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server of its own process.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(words: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_foretoken"));
        command.args(["serve", "--port", "0", "--api-key", KEY]).args(words);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let served = lines.by_ref().map(Result::unwrap).find(|line| line.contains("is served at"));
        let served = served.expect("the server says where it is");
        let address = served.rsplit_once("http://").unwrap().1.to_owned();
        std::thread::spawn(move || {
            lines.for_each(|line| eprintln!("{}", line.unwrap_or_default()))
        });
        Self { child, address }
    }

    fn connect(&self) -> TcpStream {
        connect(&self.address)
    }

    fn send(&self, path: &str, body: Option<&str>, key: &str) -> TcpStream {
        send(self.connect(), path, body, key)
    }

    fn post(&self, body: &Value) -> (u16, String) {
        answer(self.send("/v1/completions", Some(&body.to_string()), KEY))
    }

    /// Counters and gauges by name and labels.
    fn metrics(&self) -> BTreeMap<String, f64> {
        let (status, text) = answer(self.send("/metrics", None, KEY));
        assert_eq!(status, 200, "{text}");
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let pair = |line: &str| line.rsplit_once(' ').map(|(k, v)| (k.to_owned(), v.to_owned()));
        lines.filter_map(pair).map(|(name, value)| (name, value.parse().unwrap())).collect()
    }

    /// The metrics once nothing is computed any more.
    fn idle_metrics(&self) -> BTreeMap<String, f64> {
        let start = Instant::now();
        loop {
            let found = self.metrics();
            let busy = ["requests_running", "requests_waiting", "kv_blocks_used"];
            if busy.iter().all(|name| found[&format!("foretoken_{name}")] == 0.0) {
                return found;
            }
            assert!(start.elapsed() < PATIENCE, "all clients are gone, but: {found:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Resident bytes; none where the system does not tell.
    fn resident(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
    }

    /// Asks it to stop, and checks that it does so in good order.
    fn stop(mut self) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already ended, unless a test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends a request. By HTTP/1.0, so that an answer ends where the connection does.
fn send(mut stream: TcpStream, path: &str, body: Option<&str>, key: &str) -> TcpStream {
    let method = if body.is_some() { "POST" } else { "GET" };
    let body = body.unwrap_or_default();
    let head = format!(
        "{method} {path} HTTP/1.0\r\nauthorization: Bearer {key}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    stream
}

/// Status and body.
fn answer(mut stream: TcpStream) -> (u16, String) {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    split(&text)
}

fn split(text: &str) -> (u16, String) {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

/// What a stream says: its text, and why it ended.
fn joined(body: &str) -> (String, Option<String>) {
    let (mut text, mut reason) = (String::new(), None);
    for line in body.lines().filter_map(|line| line.strip_prefix("data: ")) {
        if line == "[DONE]" {
            continue;
        }
        let object: Value = serde_json::from_str(line).unwrap();
        assert_eq!(object.get("error"), None, "{object}");
        text += object["choices"][0]["text"].as_str().unwrap();
        reason = object["choices"][0]["finish_reason"].as_str().map(str::to_owned);
    }
    (text, reason)
}

/// A request, and the text that it must bring.
struct Job {
    body: Value,
    text: String,
    reason: String,
}

/// Jobs whose texts `foretoken run` wrote alone, without a draft.
fn jobs() -> Vec<Job> {
    let prompts = ["fn main() {", "use std::", "/// Returns the", "impl Iterator for "];
    let job = |i: usize| {
        let (prompt, temperature) = (prompts[i % 4], ["0", "0.7", "1"][i % 3]);
        let (seed, tokens) = (i.to_string(), [40, 90, 160][i / 4 % 3].to_string());
        let words = ["run", prompt, "--json", "--draft", "off", "--ignore-eos"];
        let output = Command::new(env!("CARGO_BIN_EXE_foretoken"))
            .args(words)
            .args(["--temperature", temperature, "--seed", &seed, "--max-tokens", &tokens])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let run: Value = serde_json::from_slice(&output.stdout).unwrap();
        let number = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let body = json!({"prompt": prompt, "temperature": number(temperature), "seed": i,
            "max_tokens": number(&tokens), "ignore_eos": true});
        let word = |key: &str| run[key].as_str().unwrap().to_owned();
        Job { body, text: word("text"), reason: word("finish_reason") }
    };
    (0..12).map(job).collect()
}

/// What a client met.
#[derive(Debug, Default)]
struct Tally {
    whole: u64,
    streamed: u64,
    slow: u64,
    left: u64,
    /// By the status of the refusal.
    refused: BTreeMap<u16, u64>,
    tokens: u64,
    slowest: Duration,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.whole += other.whole;
        self.streamed += other.streamed;
        self.slow += other.slow;
        self.left += other.left;
        other.refused.iter().for_each(|(k, n)| *self.refused.entry(*k).or_default() += n);
        self.tokens += other.tokens;
        self.slowest = self.slowest.max(other.slowest);
    }

    fn refuse(&mut self, status: u16) {
        *self.refused.entry(status).or_default() += 1;
    }

    fn answered(&self) -> u64 {
        self.whole + self.streamed + self.slow
    }
}

/// One of many clients.
struct Client<'a> {
    server: &'a Server,
    jobs: &'a [Job],
    rng: Rng,
    tally: Tally,
}

impl Client<'_> {
    fn work(mut self, over: &AtomicBool) -> Tally {
        while !over.load(Ordering::Relaxed) {
            match self.rng.below(100) {
                0..40 => self.stream(),
                40..60 => self.whole(),
                60..75 => self.leave(),
                75..82 => self.dawdle(),
                82..88 => self.blunder(),
                88..94 => self.guess(),
                94..97 => self.ask_too_much(),
                _ => self.say_nothing(),
            }
        }
        self.tally
    }

    fn job(&mut self, stream: bool) -> (usize, String) {
        let i = self.rng.below(self.jobs.len());
        let mut body = self.jobs[i].body.clone();
        body["stream"] = json!(stream);
        (i, body.to_string())
    }

    /// Sends a job until it is taken; which, and the open connection behind the answer's head.
    fn taken(&mut self, stream: bool) -> (usize, TcpStream) {
        loop {
            let (job, body) = self.job(stream);
            let mut socket = self.server.send("/v1/completions", Some(&body), KEY);
            let mut head = vec![];
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                assert_eq!(socket.read(&mut byte).unwrap(), 1, "the answer ends in its head");
                head.push(byte[0]);
            }
            match split(std::str::from_utf8(&head).unwrap()).0 {
                200 => return (job, socket),
                429 => self.tally.refuse(429),
                status => {
                    let mut rest = String::new();
                    let _ = socket.read_to_string(&mut rest);
                    panic!("status {status} for {body}: {rest}");
                }
            }
            std::thread::sleep(RETRY);
        }
    }

    fn check(&mut self, job: usize, text: &str, reason: Option<&str>) {
        let job = &self.jobs[job];
        assert_eq!(text, job.text, "of {}", job.body);
        assert_eq!(reason, Some(job.reason.as_str()), "of {}", job.body);
        self.tally.tokens += job.body["max_tokens"].as_u64().unwrap();
    }

    fn stream(&mut self) {
        let start = Instant::now();
        let (job, mut socket) = self.taken(true);
        let mut body = String::new();
        socket.read_to_string(&mut body).unwrap();
        assert!(body.ends_with("data: [DONE]\n\n"), "{body}");
        let (text, reason) = joined(&body);
        self.check(job, &text, reason.as_deref());
        self.tally.streamed += 1;
        self.tally.slowest = self.tally.slowest.max(start.elapsed());
    }

    fn whole(&mut self) {
        let (job, mut socket) = self.taken(false);
        let mut body = String::new();
        socket.read_to_string(&mut body).unwrap();
        let answer: Value = serde_json::from_str(&body).unwrap();
        let choice = &answer["choices"][0];
        self.check(job, choice["text"].as_str().unwrap(), choice["finish_reason"].as_str());
        self.tally.whole += 1;
    }

    /// Leaves in the middle of a stream.
    fn leave(&mut self) {
        let (job, mut socket) = self.taken(true);
        let mut body = vec![0; 1 + self.rng.below(4000)];
        let read = socket.read(&mut body).unwrap();
        socket.shutdown(Shutdown::Both).unwrap();
        let text = String::from_utf8_lossy(&body[..read]).into_owned();
        let complete = text.rsplit_once("\n\n").map_or("", |(complete, _)| complete);
        let (text, _) = joined(complete);
        assert!(self.jobs[job].text.starts_with(&text), "{text:?}");
        self.tally.left += 1;
    }

    /// Reads a stream slowly.
    fn dawdle(&mut self) {
        let (job, mut socket) = self.taken(true);
        let (mut body, mut part) = (vec![], [0; 2000]);
        loop {
            std::thread::sleep(Duration::from_millis(10));
            match socket.read(&mut part).unwrap() {
                0 => break,
                read => body.extend_from_slice(&part[..read]),
            }
        }
        let (text, reason) = joined(std::str::from_utf8(&body).unwrap());
        self.check(job, &text, reason.as_deref());
        self.tally.slow += 1;
    }

    fn refused(&mut self, body: &str, key: &str, expected: u16) {
        let (status, text) = answer(self.server.send("/v1/completions", Some(body), key));
        assert_eq!(status, expected, "{text}");
        let error: Value = serde_json::from_str(&text).unwrap();
        assert!(error["error"]["message"].is_string(), "{text}");
        self.tally.refuse(status);
    }

    /// Sends what is no request: a part of one, or bytes of another value.
    fn blunder(&mut self) {
        let (_, body) = self.job(true);
        let cut = &body[..self.rng.below(body.len())];
        self.refused(cut, KEY, 400);
        self.refused(&body.replacen(':', "::", 1), KEY, 400);
        self.refused(r#"{"prompt": {"a": [[[[]]]]}, "seed": "x"}"#, KEY, 400);
    }

    fn guess(&mut self) {
        let (_, body) = self.job(true);
        let len = self.rng.below(KEY.len());
        self.refused(&body, &KEY[..len], 401);
        self.refused(&body, &format!("{KEY}{len}"), 401);
    }

    /// A prompt of a megabyte.
    fn ask_too_much(&mut self) {
        let words = "let x = y; ".repeat((1 << 20) / 11);
        self.refused(&json!({"prompt": words}).to_string(), KEY, 400);
    }

    /// Connects, sends half a head, and goes.
    fn say_nothing(&mut self) {
        let mut socket = self.server.connect();
        socket.write_all(b"POST /v1/completions HTTP/1.1\r\nconte").unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Resident bytes when the load is warm and the most after that.
fn watch(server: &Server, seconds: f64) -> Option<(u64, u64)> {
    let (mut warm, mut most) = (0, 0);
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < seconds {
        std::thread::sleep(Duration::from_millis(100));
        let now = server.resident()?;
        if start.elapsed().as_secs_f64() < seconds / 3.0 {
            warm = now.max(warm);
        }
        most = now.max(most);
    }
    Some((warm, most))
}

/// What the server counted is what its clients saw.
fn check_metrics(found: &BTreeMap<String, f64>, tally: &Tally) {
    let of = |name: &str| found[&format!("foretoken_{name}")] as u64;
    let ended = |reason: &str| of(&format!("requests_ended_total{{finished_reason=\"{reason}\"}}"));
    let refused = |reason: &str| of(&format!("requests_refused_total{{reason=\"{reason}\"}}"));
    let met = |status: u16| tally.refused.get(&status).copied().unwrap_or(0);
    assert_eq!(ended("error"), 0);
    // Who leaves may do so after the last token.
    let length = ended("length");
    assert!((tally.answered()..=tally.answered() + tally.left).contains(&length));
    assert_eq!(length + ended("stop") + ended("abort"), tally.answered() + tally.left);
    assert_eq!(refused("invalid"), met(400));
    assert_eq!(refused("unauthorized"), met(401));
    assert_eq!(refused("queue_full"), met(429));
    assert_eq!(refused("unavailable") + refused("other"), 0);
    assert!(of("generation_tokens_total") >= tally.tokens);
    assert_eq!(of("request_seconds_count"), length);
    assert!(of("accepted_tokens_total") <= of("draft_tokens_total"));
}

#[test]
fn sixty_four_clients_get_the_texts_that_run_prints() {
    let seconds: f64 =
        std::env::var("FORETOKEN_LOAD_SECONDS").map_or(3.0, |text| text.parse().unwrap());
    let jobs = jobs();
    // Few blocks for many requests, so that some lose theirs; a queue that is sometimes full.
    // One thread leaves the clients some of a small machine.
    let words = ["--draft-tokens", "3", "--kv-tokens", "768", "--max-queue", "40"];
    let server = Server::start(&[&words[..], &["--threads", "1"]].concat());
    let over = AtomicBool::new(false);
    let (tally, memory) = std::thread::scope(|scope| {
        let client = |i: usize| {
            let (rng, tally) = (Rng::new(i as u64), Tally::default());
            let client = Client { server: &server, jobs: &jobs, rng, tally };
            let over = &over;
            scope.spawn(move || client.work(over))
        };
        let clients: Vec<_> = (0..CLIENTS).map(client).collect();
        let memory = watch(&server, seconds);
        over.store(true, Ordering::Relaxed);
        let mut tally = Tally::default();
        clients.into_iter().for_each(|client| tally.add(&client.join().unwrap()));
        (tally, memory)
    });
    let found = server.idle_metrics();
    println!("{tally:?}");
    let steps = found["foretoken_steps_total"];
    let mean = |name: &str| {
        found[&format!("foretoken_{name}_sum")] / found[&format!("foretoken_{name}_count")]
    };
    println!(
        "{:.0} tokens/s delivered, {steps} steps, {:.0} % of the time in them, {} preemptions, mean first token {:.1} ms, mean gap {:.2} ms",
        tally.tokens as f64 / seconds,
        found["foretoken_step_seconds_total"] / seconds * 1e2,
        found["foretoken_preemptions_total"],
        mean("time_to_first_token_seconds") * 1e3,
        mean("inter_token_seconds") * 1e3,
    );
    check_metrics(&found, &tally);
    assert!(tally.streamed > 0 && tally.whole > 0 && tally.left > 0, "too little was tried");
    if let Some((warm, most)) = memory {
        let growth = most as f64 / warm as f64 - 1.0;
        println!("{} MiB resident when warm, at most {growth:+.1e} of it more later", warm >> 20);
        // A short run ends before all of the clients' ways have been tried once.
        assert!(seconds < 30.0 || growth <= 0.05, "memory grows: {warm} to {most} bytes");
    }
    server.stop();
}

#[test]
fn a_client_that_dies_frees_its_blocks_at_once() {
    let server = Server::start(&["--draft", "off"]);
    let free = |found: &BTreeMap<String, f64>| found["foretoken_kv_blocks_used"] == 0.0;
    for stream in [true, false] {
        let body = json!({"prompt": "fn main() {", "max_tokens": 1500, "ignore_eos": true,
            "stream": stream, "n": 8});
        let mut socket = server.send("/v1/completions", Some(&body.to_string()), KEY);
        if stream {
            socket.read_exact(&mut [0; 1000]).unwrap();
        }
        let mut before = server.metrics();
        while free(&before) {
            before = server.metrics();
        }
        // As the system does for a process that is killed: unread bytes are thrown away.
        drop(socket);
        let start = Instant::now();
        let mut after = server.metrics();
        while !free(&after) {
            after = server.metrics();
        }
        let took = start.elapsed();
        let steps = after["foretoken_steps_total"] - before["foretoken_steps_total"];
        let aborted = after["foretoken_requests_ended_total{finished_reason=\"abort\"}"];
        assert!(aborted > 0.0, "the requests came to their own end: too few tokens were asked");
        println!("stream: {stream}; {took:?} and at most {steps} steps until all blocks were free");
        // Well under what was asked for, also where the machine is busy with other tests.
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
    let (status, text) = server.post(&json!({"prompt": "fn", "max_tokens": 3}));
    assert_eq!(status, 200, "{text}");
    server.stop();
}

/// Tells the test below, run as a process of its own, which server to read from.
const VICTIM: &str = "FORETOKEN_LOAD_VICTIM";

/// A client's process, which is killed while it reads; started by the test behind it.
#[test]
fn victim() {
    let Ok(address) = std::env::var(VICTIM) else {
        println!("nothing to do: {VICTIM} names no server");
        return;
    };
    let body = json!({"prompt": "fn main() {", "max_tokens": 1500, "ignore_eos": true,
        "stream": true, "n": 8});
    let mut socket = send(connect(&address), "/v1/completions", Some(&body.to_string()), KEY);
    socket.read_exact(&mut [0; 1000]).unwrap();
    eprintln!("reading");
    while socket.read(&mut [0; 1000]).unwrap() > 0 {}
    eprintln!("over");
}

#[test]
fn a_process_that_is_killed_frees_its_blocks_and_disturbs_nobody() {
    let server = Server::start(&["--draft", "off"]);
    let body = json!({"prompt": "use std::", "max_tokens": 1000, "ignore_eos": true, "seed": 1,
        "stream": true});
    let ask = || server.send("/v1/completions", Some(&body.to_string()), KEY);
    let alone = joined(&answer(ask()).1);
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["victim", "--exact", "--nocapture"])
        .env(VICTIM, &server.address)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(victim.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line == "reading"), "the client met no stream");
    let survivor = ask();
    // Its head comes before its place.
    survivor.peek(&mut [0; 1]).unwrap();
    let mut before = server.metrics();
    while before["foretoken_requests_running"] < 9.0 {
        assert_eq!(before["foretoken_requests_ended_total{finished_reason=\"length\"}"], 1.0);
        before = server.metrics();
    }
    // By SIGKILL: it closes nothing itself.
    victim.kill().unwrap();
    let start = Instant::now();
    let after = loop {
        let found = server.metrics();
        if found["foretoken_requests_running"] <= 1.0 {
            break found;
        }
        // Well under what was asked for, also where the machine is busy with other tests.
        assert!(start.elapsed() < Duration::from_secs(2), "its requests go on: {found:?}");
    };
    let steps = after["foretoken_steps_total"] - before["foretoken_steps_total"];
    println!("{:?} and at most {steps} steps until its blocks were free", start.elapsed());
    victim.wait().unwrap();
    assert_eq!(after["foretoken_requests_ended_total{finished_reason=\"abort\"}"], 8.0);
    assert_eq!(joined(&answer(survivor).1), alone);
    server.idle_metrics();
    server.stop();
}
