//! `foretoken run`: continue one prompt and stream the text.

use crate::Io;
use crate::cli::{HeadName, RunArgs, SamplingArgs};
use crate::load::{self, STEP_TOKENS, Unexpected};
use crate::speed::{Roofline, Timings};
use anyhow::{Context, bail};
use engine::chat::{ChatInput, ChatTemplate};
use engine::engine::{Engine, EngineConfig, Progress};
use engine::kv::BLOCK_LEN;
use engine::model::Model;
use engine::request::{Event, FinishReason, Request, RequestId};
use engine::sampler::SamplingParams;
use engine::stream::TextStream;
use engine::tokenizer::Tokenizer;
use kernels::program::TokenId;
use serde_json::json;
use std::path::Path;
use std::time::Instant;

/// Runs the command.
pub(crate) fn run(args: &RunArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    let start = Instant::now();
    let (name, prompt) = split_arguments(&args.model_and_prompt)?;
    let model = load::open(
        name,
        load::head(args.device.head.unwrap_or(HeadName::Auto), args.device.device),
    )?;
    let tokenizer = tokenizer(&model, args)?;
    let prompt = prompt_tokens(args, prompt, &model, tokenizer.as_ref(), io)?;
    let request = request(args, prompt, &model)?;
    let mut engine = engine(&model, &request, args, io)?;
    let mut run = Generation::new(tokenizer.as_ref(), &request.prompt, args)?;
    run.timings.load = start.elapsed();
    run.timings.prompt_tokens = request.prompt.len();
    let id = engine.submit(request)?;
    let reason = run.drive(&mut engine, id, io)?;
    // The bandwidth is measured next, in memory of its own.
    drop(engine);
    run.report(reason, &model, args, io)
}

/// Which of the (at most two) words is the model and which the prompt.
fn split_arguments(words: &[String]) -> anyhow::Result<(&str, Option<&str>)> {
    match words {
        [] => Ok(("demo", None)),
        [one] if names_a_model(one) => Ok((one, None)),
        [one] if looks_like_a_path(one) => {
            bail!("no model folder at {one}: give a folder, or a prompt after the model's name")
        }
        [prompt] => Ok(("demo", Some(prompt))),
        [model, prompt, ..] => Ok((model, Some(prompt))),
    }
}

fn names_a_model(word: &str) -> bool {
    matches!(word, "demo" | "demo-draft") || Path::new(word).is_dir()
}

fn looks_like_a_path(word: &str) -> bool {
    let start = word.starts_with(['/', '.', '~']);
    (start || word.contains('/')) && !word.contains(char::is_whitespace)
}

/// The model's tokenizer; with `--ids` a model may lack one.
fn tokenizer(model: &Model, args: &RunArgs) -> anyhow::Result<Option<Tokenizer>> {
    match Tokenizer::from_files(model.files()) {
        Ok(tokenizer) => Ok(Some(tokenizer)),
        Err(engine::Error::MissingFile { .. }) if args.ids.is_some() && args.stop.is_empty() => {
            Ok(None)
        }
        Err(e @ engine::Error::MissingFile { .. }) => bail!("{e}, or give token ids by --ids"),
        Err(e) => Err(e.into()),
    }
}

fn prompt_tokens(
    args: &RunArgs,
    prompt: Option<&str>,
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    io: &mut Io<'_>,
) -> anyhow::Result<Vec<TokenId>> {
    if let Some(ids) = &args.ids {
        if prompt.is_some() || args.chat {
            bail!("--ids is the prompt: leave out the text and --chat");
        }
        return Ok(ids.iter().map(|&id| TokenId(id)).collect());
    }
    let tokenizer = tokenizer.context("a text prompt needs a tokenizer")?;
    let text = match prompt {
        Some(text) => text.to_owned(),
        None => load::prompt_from_input(io)?,
    };
    if args.chat {
        let text = chat_text(&text, args, model)?;
        return Ok(tokenizer.encode(&text, false)?);
    }
    Ok(tokenizer.encode(&text, true)?)
}

fn chat_text(text: &str, args: &RunArgs, model: &Model) -> anyhow::Result<String> {
    let template = ChatTemplate::from_files(model.files())?
        .context("this model has no chat template: run without --chat")?;
    let system = args.system.as_ref().map(|s| json!({"role": "system", "content": s}));
    let user = json!({"role": "user", "content": text});
    let messages: serde_json::Value = system.into_iter().chain([user]).collect();
    let extra = serde_json::Map::from_iter([("now".to_owned(), json!(unix_seconds()))]);
    let input =
        ChatInput { messages: &messages, tools: None, add_generation_prompt: true, extra: &extra };
    Ok(template.render(&input)?)
}

/// Seconds since 1970 (UTC), for templates that print today's date.
fn unix_seconds() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

fn request(args: &RunArgs, prompt: Vec<TokenId>, model: &Model) -> anyhow::Result<Request> {
    let stop_tokens = if args.ignore_eos { vec![] } else { model.stop_tokens().to_vec() };
    let sampling = sampling(&args.sampling);
    sampling.validate()?;
    Ok(Request { prompt, max_tokens: args.max_tokens, stop_tokens, sampling })
}

fn sampling(args: &SamplingArgs) -> SamplingParams {
    SamplingParams {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        typical_p: args.typical_p,
        repetition_penalty: args.repetition_penalty,
        frequency_penalty: args.frequency_penalty,
        presence_penalty: args.presence_penalty,
        logit_bias: args.logit_bias.iter().map(|&(id, bias)| (TokenId(id), bias)).collect(),
        seed: args.seed,
    }
}

/// An engine with room for this one request.
fn engine(model: &Model, request: &Request, args: &RunArgs, io: &Io<'_>) -> anyhow::Result<Engine> {
    let spec = model.spec();
    let wanted = request.prompt.len().saturating_add(request.max_tokens as usize);
    let positions = wanted.min(spec.context_len as usize);
    let config = EngineConfig {
        vocab: spec.vocab,
        context_len: spec.context_len,
        step_tokens: STEP_TOKENS.min(request.prompt.len().max(1)),
        max_sequences: 1,
        blocks: positions.div_ceil(BLOCK_LEN).max(1),
        block_len: BLOCK_LEN,
        max_waiting: 1,
        max_drafted: 0,
    };
    config.check(request)?;
    let backend = load::backend(&args.device)?;
    let runner = load::build(model, backend.as_ref(), &config.step_limits(), io)?;
    Ok(Engine::new(runner, config))
}

/// What has been generated so far.
struct Generation<'a> {
    stream: Option<TextStream<'a>>,
    has_text: bool,
    streams_text: bool,
    ids: Vec<u32>,
    text: String,
    timings: Timings,
}

impl<'a> Generation<'a> {
    fn new(
        tokenizer: Option<&'a Tokenizer>,
        prompt: &[TokenId],
        args: &RunArgs,
    ) -> anyhow::Result<Self> {
        let stream = |t| TextStream::new(t, args.stop.clone()).after(prompt);
        let stream = tokenizer.map(stream).transpose()?;
        let (ids, text, timings) = (vec![], String::new(), Timings::default());
        let has_text = tokenizer.is_some();
        Ok(Self { stream, has_text, streams_text: !args.json, ids, text, timings })
    }

    /// Steps the engine until the request ends.
    fn drive(
        &mut self,
        engine: &mut Engine,
        id: RequestId,
        io: &mut Io<'_>,
    ) -> anyhow::Result<FinishReason> {
        let mut events = vec![];
        loop {
            let start = Instant::now();
            let progress = engine.step(&mut events).context(Unexpected)?;
            self.count(progress, start);
            for event in events.drain(..) {
                match event {
                    Event::Token { token, .. } => {
                        if self.token(token, io)? {
                            engine.cancel(id);
                            return Ok(FinishReason::Stop);
                        }
                    }
                    Event::Finished { reason, .. } => return Ok(reason),
                    Event::Failed { reason, .. } => {
                        return Err(anyhow::anyhow!(reason).context(Unexpected));
                    }
                }
            }
        }
    }

    fn count(&mut self, progress: Progress, start: Instant) {
        match progress {
            Progress::Idle => {}
            Progress::Worked { prefill_tokens: 0, decode_tokens } => {
                self.timings.decode += start.elapsed();
                self.timings.decode_tokens += decode_tokens;
            }
            Progress::Worked { .. } => self.timings.prompt += start.elapsed(),
        }
    }

    /// Takes a token; true once a stop string is complete.
    fn token(&mut self, token: TokenId, io: &mut Io<'_>) -> anyhow::Result<bool> {
        self.ids.push(token.0);
        let Some(stream) = &mut self.stream else { return Ok(false) };
        let piece = stream.push(token)?;
        self.emit(&piece.text, io)?;
        Ok(piece.stopped)
    }

    fn emit(&mut self, text: &str, io: &mut Io<'_>) -> anyhow::Result<()> {
        self.text.push_str(text);
        if self.streams_text && !text.is_empty() {
            write!(io.out, "{text}")?;
            io.out.flush()?;
        }
        Ok(())
    }

    /// Prints what is left: the held back text, then the JSON object or the line of speeds.
    fn report(
        mut self,
        reason: FinishReason,
        model: &Model,
        args: &RunArgs,
        io: &mut Io<'_>,
    ) -> anyhow::Result<()> {
        if let Some(mut stream) = self.stream.take() {
            let rest = stream.finish()?;
            self.emit(&rest, io)?;
        }
        if args.json {
            let text = self.has_text.then_some(&self.text);
            let roofline = roofline(model, args);
            let object = json!({
                "ids": self.ids,
                "text": text,
                "finish_reason": reason.as_str(),
                "timings": self.timings.json(&roofline),
            });
            writeln!(io.out, "{object}")?;
            return Ok(());
        }
        if !self.has_text {
            let ids: Vec<String> = self.ids.iter().map(u32::to_string).collect();
            write!(io.out, "{}", ids.join(","))?;
        }
        writeln!(io.out)?;
        if io.err_is_terminal {
            let roofline = roofline(model, args);
            writeln!(io.err, "{}", self.timings.line(&roofline))?;
        }
        Ok(())
    }
}

/// What this machine can read with the threads that were used.
fn roofline(model: &Model, args: &RunArgs) -> Roofline {
    Roofline::measure(model.program(), load::threads(&args.device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_word_is_the_prompt_unless_it_names_a_model() {
        let split = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&w| w.to_owned()).collect();
            split_arguments(&words).map(|(m, p)| (m.to_owned(), p.map(str::to_owned)))
        };
        let prompt = |p: &str| Some(p.to_owned());
        assert_eq!(split(&["fn main() {"]).unwrap(), ("demo".to_owned(), prompt("fn main() {")));
        assert_eq!(split(&["demo-draft"]).unwrap(), ("demo-draft".to_owned(), None));
        assert_eq!(split(&["m", "hi"]).unwrap(), ("m".to_owned(), prompt("hi")));
        assert_eq!(split(&["// a comment"]).unwrap().1, prompt("// a comment"));
        let refused = split(&["./no-such-folder"]).unwrap_err().to_string();
        assert!(refused.contains("./no-such-folder"), "{refused}");
    }
}
