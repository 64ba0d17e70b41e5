//! `foretoken run`: continue one prompt and stream the text.

use crate::Io;
use crate::cli::{HeadName, RunArgs, SamplingArgs};
use crate::generate::{self, Ending};
use crate::load::{self, Unexpected};
use crate::speculate::Draft;
use crate::speed::{Roofline, Timings};
use crate::verify::{Difference, first_difference};
use anyhow::{Context, bail};
use engine::chat::{ChatInput, ChatTemplate};
use engine::engine::Engine;
use engine::model::Model;
use engine::request::{Request, TokenSource};
use engine::sampler::SamplingParams;
use engine::stream::TextStream;
use engine::tokenizer::Tokenizer;
use kernels::Backend;
use kernels::program::TokenId;
use serde_json::json;
use std::borrow::Cow;
use std::path::Path;
use std::time::Instant;

/// Runs the command.
pub(crate) fn run(args: &RunArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    let start = Instant::now();
    let (name, prompt) = split_arguments(&args.model_and_prompt)?;
    let head = load::head(args.device.head.unwrap_or(HeadName::Auto), args.device.device);
    let model = load::open(name.unwrap_or("demo"), head)?;
    let draft = Draft::open(&args.speculation, &model, name.is_some(), &args.device)?;
    check_flags(args, draft.is_some(), io)?;
    let tokenizer = tokenizer(&model, args.ids.is_some() && args.stop.is_empty())?;
    let prompt = prompt_tokens(args, prompt, &model, tokenizer.as_ref(), io)?;
    let request = request(args, prompt, &model)?;
    let backend = load::backend(&args.device)?;
    let maker = Maker { model: &model, backend: backend.as_ref(), request: &request };
    let mut engine = maker.engine(draft.as_ref(), io)?;
    let mut run = Generation::new(tokenizer.as_ref(), &request.prompt, args)?;
    run.timings.load = start.elapsed();
    let ending = run.drive(&mut engine, request.clone(), io)?;
    // What is measured next gets the memory, and the processor, for itself.
    drop(engine);
    let mut plain = None;
    if args.compare {
        let start = Instant::now();
        let mut engine = maker.engine(None, io)?;
        let mut run = Generation::new(tokenizer.as_ref(), &request.prompt, args)?;
        run.show = Show::Nothing;
        run.timings.load = start.elapsed();
        run.drive(&mut engine, request.clone(), io)?;
        plain = Some(run);
    }
    let sampling = &request.sampling;
    let report = Report { run, ending, plain, draft, sampling, model: &model, args };
    report.print(io)?;
    report.check()
}

/// Flags that need something else to be there.
fn check_flags(args: &RunArgs, drafts: bool, io: &Io<'_>) -> anyhow::Result<()> {
    for (given, flag) in [(args.compare, "--compare"), (args.show_draft, "--show-draft")] {
        if given && !drafts {
            bail!("{flag} needs a draft: name one by --draft");
        }
    }
    if args.show_draft && !io.out_is_terminal {
        bail!("--show-draft colours text at a terminal, but standard output is none");
    }
    Ok(())
}

/// Which of the (at most two) words is the model and which the prompt.
fn split_arguments(words: &[String]) -> anyhow::Result<(Option<&str>, Option<&str>)> {
    match words {
        [] => Ok((None, None)),
        [one] if names_a_model(one) => Ok((Some(one), None)),
        [one] if looks_like_a_path(one) => {
            bail!("no model folder at {one}: give a folder, or a prompt after the model's name")
        }
        [prompt] => Ok((None, Some(prompt))),
        [model, prompt, ..] => Ok((Some(model), Some(prompt))),
    }
}

fn names_a_model(word: &str) -> bool {
    matches!(word, "demo" | "demo-draft") || Path::new(word).is_dir()
}

fn looks_like_a_path(word: &str) -> bool {
    let start = word.starts_with(['/', '.', '~']);
    (start || word.contains('/')) && !word.contains(char::is_whitespace)
}

/// The model's tokenizer; a model may lack one where only ids go in and out.
pub(crate) fn tokenizer(model: &Model, may_lack: bool) -> anyhow::Result<Option<Tokenizer>> {
    match Tokenizer::from_files(model.files()) {
        Ok(tokenizer) => Ok(Some(tokenizer)),
        Err(engine::Error::MissingFile { .. }) if may_lack => Ok(None),
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
    Ok(Request { stop_tokens, sampling, ..Request::new(prompt, args.max_tokens) })
}

/// The parameters as the engine wants them, not checked.
pub(crate) fn sampling(args: &SamplingArgs) -> SamplingParams {
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
        ..SamplingParams::default()
    }
}

/// Makes engines with room for one request.
struct Maker<'a> {
    model: &'a Model,
    backend: &'a dyn Backend,
    request: &'a Request,
}

impl Maker<'_> {
    fn engine(&self, draft: Option<&Draft>, io: &mut Io<'_>) -> anyhow::Result<Engine> {
        let Request { prompt, max_tokens, .. } = self.request;
        let most = draft.map_or(0, Draft::max_drafted);
        let config = generate::config(self.model.spec(), prompt.len(), *max_tokens, most);
        config.check(self.request)?;
        generate::engine(self.model, draft, config, self.backend, io)
    }
}

/// What becomes of text as it is generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Show {
    Nothing,
    Text,
    /// Text in the colour of the token that completed it.
    Colours,
}

/// What has been generated so far.
struct Generation<'a> {
    stream: Option<TextStream<&'a Tokenizer>>,
    show: Show,
    ids: Vec<(TokenId, TokenSource)>,
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
        let show = match (args.json, args.show_draft) {
            (true, _) => Show::Nothing,
            (false, true) => Show::Colours,
            (false, false) => Show::Text,
        };
        Ok(Self { stream, show, ids: vec![], text: String::new(), timings: Timings::default() })
    }

    /// Generates until the request ends, and ends the text.
    fn drive(
        &mut self,
        engine: &mut Engine,
        request: Request,
        io: &mut Io<'_>,
    ) -> anyhow::Result<Ending> {
        let mut timings = self.timings;
        let mut take = |token, source| self.token(token, source, io);
        let ending = generate::drive(engine, request, &mut timings, &mut take)?;
        self.timings = timings;
        if let Some(stream) = &mut self.stream {
            let rest = stream.finish()?;
            let source = self.ids.last().map_or(TokenSource::Plain, |(_, source)| *source);
            self.emit(&rest, source, io)?;
        }
        Ok(ending)
    }

    /// Takes a token; true once a stop string is complete.
    fn token(
        &mut self,
        token: TokenId,
        source: TokenSource,
        io: &mut Io<'_>,
    ) -> anyhow::Result<bool> {
        self.ids.push((token, source));
        let Some(stream) = &mut self.stream else { return Ok(false) };
        let piece = stream.push(token)?;
        self.emit(&piece.text, source, io)?;
        Ok(piece.stopped)
    }

    fn emit(&mut self, text: &str, source: TokenSource, io: &mut Io<'_>) -> anyhow::Result<()> {
        self.text.push_str(text);
        if self.show != Show::Nothing && !text.is_empty() {
            write!(io.out, "{}", self.painted(text, source))?;
            io.out.flush()?;
        }
        Ok(())
    }

    fn painted<'t>(&self, text: &'t str, source: TokenSource) -> Cow<'t, str> {
        let colour = colour(source).filter(|_| self.show == Show::Colours);
        match colour {
            None => Cow::Borrowed(text),
            Some(colour) => Cow::Owned(format!("\x1b[{colour}m{text}\x1b[0m")),
        }
    }
}

/// The terminal's number of the colour that tells how a token came about.
fn colour(source: TokenSource) -> Option<u8> {
    match source {
        TokenSource::Plain => None,
        TokenSource::Drafted => Some(32),
        TokenSource::Corrected => Some(31),
        TokenSource::Bonus => Some(34),
    }
}

/// What is said at the end.
struct Report<'a> {
    run: Generation<'a>,
    ending: Ending,
    /// The same request without the draft, if that was asked for.
    plain: Option<Generation<'a>>,
    draft: Option<Draft>,
    sampling: &'a SamplingParams,
    model: &'a Model,
    args: &'a RunArgs,
}

impl Report<'_> {
    fn print(&self, io: &mut Io<'_>) -> anyhow::Result<()> {
        if self.args.json {
            writeln!(io.out, "{}", self.json())?;
            return Ok(());
        }
        if self.run.stream.is_none() {
            let ids = self
                .run
                .ids
                .iter()
                .map(|(id, source)| self.run.painted(&id.0.to_string(), *source).into_owned());
            write!(io.out, "{}", ids.collect::<Vec<_>>().join(","))?;
        }
        writeln!(io.out)?;
        if self.run.show == Show::Colours {
            let named = [
                ("drafted", TokenSource::Drafted),
                ("corrected", TokenSource::Corrected),
                ("bonus", TokenSource::Bonus),
            ];
            let named = named.map(|(name, source)| self.run.painted(name, source).into_owned());
            writeln!(io.out, "[{}; without colour: nothing was drafted]", named.join(", "))?;
        }
        if io.err_is_terminal {
            writeln!(io.err, "{}", self.line())?;
        }
        if let Some(plain) = &self.plain {
            let [drafted, plain] = [&self.run, plain].map(|run| run.timings.decode_rate());
            let speed_up = self.speed_up().map_or(String::new(), |s| format!(", {s:.2} x"));
            let text = if self.same() { "the same" } else { "another" };
            writeln!(
                io.err,
                "decode {drafted:.1} tok/s with the draft, {plain:.1} tok/s without{speed_up}, {text} text"
            )?;
        }
        Ok(())
    }

    fn line(&self) -> String {
        let speeds = self.run.timings.line(&self.roofline());
        match &self.draft {
            None => speeds,
            Some(draft) => format!("{speeds} | {}", draft.line(&self.ending)),
        }
    }

    fn json(&self) -> serde_json::Value {
        let roofline = self.roofline();
        let ids: Vec<u32> = self.run.ids.iter().map(|(id, _)| id.0).collect();
        let compare = self.plain.as_ref().map(|plain| {
            json!({
                "same": self.same(),
                "speed_up": self.speed_up(),
                "plain_timings": plain.timings.json(&roofline),
            })
        });
        json!({
            "ids": ids,
            "text": self.run.stream.is_some().then_some(&self.run.text),
            "finish_reason": self.ending.reason.as_str(),
            "timings": self.run.timings.json(&roofline),
            "speculation": self.draft.as_ref().map(|draft| draft.json(&self.ending)),
            "compare": compare,
        })
    }

    /// Decoded tokens per second with the draft, over those without.
    fn speed_up(&self) -> Option<f64> {
        let plain = self.plain.as_ref()?.timings.decode_rate();
        (plain > 0.0).then(|| self.run.timings.decode_rate() / plain)
    }

    fn same(&self) -> bool {
        self.difference().is_none()
    }

    /// The first place where the draft changed a token.
    fn difference(&self) -> Option<Difference> {
        let ids = |run: &Generation<'_>| run.ids.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        first_difference(&ids(self.plain.as_ref()?), &ids(&self.run))
    }

    /// What this machine can read with the threads that were used.
    fn roofline(&self) -> Roofline {
        let draft_bytes = self.draft.as_ref().map_or(Some(0), Draft::bytes_per_token);
        Roofline::measure(self.model.program(), draft_bytes, load::threads(&self.args.device))
    }

    /// Fails if the draft changed the text though its rule forbids that.
    fn check(&self) -> anyhow::Result<()> {
        let keeps = self.draft.as_ref().is_some_and(|draft| draft.keeps_the_text(self.sampling));
        match self.difference().filter(|_| keeps) {
            None => Ok(()),
            Some(difference) => {
                Err(anyhow::anyhow!("the draft changed the text: {difference}").context(Unexpected))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_word_is_the_prompt_unless_it_names_a_model() {
        let split = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&w| w.to_owned()).collect();
            split_arguments(&words).map(|(m, p)| (m.map(str::to_owned), p.map(str::to_owned)))
        };
        let some = |p: &str| Some(p.to_owned());
        assert_eq!(split(&["fn main() {"]).unwrap(), (None, some("fn main() {")));
        assert_eq!(split(&["demo-draft"]).unwrap(), (some("demo-draft"), None));
        assert_eq!(split(&["m", "hi"]).unwrap(), (some("m"), some("hi")));
        assert_eq!(split(&["// a comment"]).unwrap().1, some("// a comment"));
        let refused = split(&["./no-such-folder"]).unwrap_err().to_string();
        assert!(refused.contains("./no-such-folder"), "{refused}");
    }
}
