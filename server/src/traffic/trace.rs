//! Requests of a recorded trace: when each came, and how long it was.
//!
//! Input: CSV text with the columns of the Azure LLM inference traces (Patel et al., Splitwise,
//! ISCA 2024), in any order, others ignored. Not here: sending.

use anyhow::{Context, bail};
use std::time::Duration;

const COLUMNS: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];

/// One request to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Arrival {
    /// Since the first request.
    pub at: Duration,
    pub prompt_tokens: u32,
    pub max_tokens: u32,
}

/// How a trace is changed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale {
    /// Multiplies times.
    pub stretch: f64,
    /// Divides tokens.
    pub shrink: f64,
    /// Most tokens of prompt and answer together; none has no limit.
    pub context: Option<u32>,
}

/// A trace that was scaled.
#[derive(Debug, PartialEq)]
pub(super) struct Trace {
    /// In order of time.
    pub arrivals: Vec<Arrival>,
    /// Requests that were longer than the context even then, and were cut to it.
    pub cut: usize,
    /// Tokens that were cut.
    pub cut_tokens: u64,
}

/// A line of a trace.
#[derive(Debug, Clone, Copy)]
struct Row {
    /// Since the year 0.
    nanoseconds: u128,
    prompt_tokens: u64,
    generated_tokens: u64,
}

/// A trace as it was recorded; at least one request, in order of time.
#[derive(Debug)]
pub(super) struct Recording(Vec<Row>);

impl Recording {
    /// The requests of `text`.
    ///
    /// # Errors
    /// The line, and what is wrong with it.
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let columns = columns(lines.next().map_or("", |(_, line)| line)).context("line 1")?;
        let row = |(i, line): (usize, &str)| {
            row(line, columns).with_context(|| format!("line {}", i + 1))
        };
        let mut rows: Vec<Row> = lines.map(row).collect::<anyhow::Result<_>>()?;
        rows.sort_by_key(|row| row.nanoseconds);
        if rows.is_empty() {
            bail!("no request in it");
        }
        Ok(Self(rows))
    }

    /// The requests to send.
    ///
    /// # Errors
    /// Times that are too long for a clock.
    pub(super) fn scaled(&self, scale: &Scale) -> anyhow::Result<Trace> {
        let mut trace = Trace { arrivals: Vec::with_capacity(self.0.len()), cut: 0, cut_tokens: 0 };
        for row in &self.0 {
            let since = row.nanoseconds - self.0[0].nanoseconds;
            let at = Duration::try_from_secs_f64(since as f64 / 1e9 * scale.stretch);
            let at = at.context("--stretch makes the trace too long")?;
            let [prompt, generated] =
                [row.prompt_tokens, row.generated_tokens].map(|tokens| shrunk(tokens, scale));
            trace.add(at, prompt, generated, scale.context);
        }
        Ok(trace)
    }
}

impl Trace {
    /// The answer keeps at most half of the context, the prompt what is left.
    fn add(&mut self, at: Duration, prompt: u32, generated: u32, context: Option<u32>) {
        let context = context.unwrap_or(u32::MAX);
        let max_tokens = generated.min((context / 2).max(1));
        let prompt_tokens = prompt.min((context - max_tokens).max(1));
        let cut = u64::from(prompt - prompt_tokens) + u64::from(generated - max_tokens);
        self.cut += usize::from(cut > 0);
        self.cut_tokens += cut;
        self.arrivals.push(Arrival { at, prompt_tokens, max_tokens });
    }
}

/// At least one token: a request without any is none.
fn shrunk(tokens: u64, scale: &Scale) -> u32 {
    (tokens as f64 / scale.shrink).round().clamp(1.0, f64::from(u32::MAX / 2)) as u32
}

/// Where the wanted columns are.
fn columns(header: &str) -> anyhow::Result<[usize; 3]> {
    let names: Vec<&str> =
        header.trim_start_matches('\u{feff}').split(',').map(str::trim).collect();
    let mut found = [0; 3];
    for (place, wanted) in found.iter_mut().zip(COLUMNS) {
        let at = names.iter().position(|name| *name == wanted);
        *place =
            at.with_context(|| format!("no column {wanted}: expected {}", COLUMNS.join(",")))?;
    }
    Ok(found)
}

fn row(line: &str, columns: [usize; 3]) -> anyhow::Result<Row> {
    let cells: Vec<&str> = line.split(',').map(str::trim).collect();
    let cell = |column: usize| {
        let cell = cells.get(columns[column]);
        cell.copied().with_context(|| format!("{} is missing", COLUMNS[column]))
    };
    let count = |column: usize| -> anyhow::Result<u64> {
        let (name, text) = (COLUMNS[column], cell(column)?);
        text.parse().with_context(|| format!("{name} is {text:?}, expected a whole number from 0"))
    };
    let text = cell(0)?;
    let nanoseconds = nanoseconds(text).with_context(|| {
        format!("TIMESTAMP is {text:?}, expected a time such as 2023-11-16 18:15:46.6805900")
    })?;
    Ok(Row { nanoseconds, prompt_tokens: count(1)?, generated_tokens: count(2)? })
}

/// Nanoseconds of `YYYY-MM-DD HH:MM:SS[.fraction][+00:00]` since the year 0.
fn nanoseconds(text: &str) -> Option<u128> {
    let text = text.strip_suffix("+00:00").or_else(|| text.strip_suffix('Z')).unwrap_or(text);
    let (date, time) = text.split_once([' ', 'T'])?;
    let [year, month, day] = numbers(date, '-')?;
    let (whole, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let [hour, minute, second] = numbers(whole, ':')?;
    let in_range = (1..=12).contains(&month) && (1..=31).contains(&day);
    if !in_range || hour > 23 || minute > 59 || second > 60 || fraction.len() > 9 {
        return None;
    }
    let fraction = u128::from(digits(fraction)?) * 10u128.pow(9 - fraction.len() as u32);
    let seconds = ((days(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    Some(u128::from(seconds) * 1_000_000_000 + fraction)
}

/// Days since the first of March of the year -400 in the Gregorian calendar: years begin in March,
/// so that the day that may be missing is their last.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let year = year + 400 - u64::from(month <= 2);
    let since_march = (month + 9) % 12;
    year * 365 + year / 4 - year / 100 + year / 400 + (153 * since_march + 2) / 5 + day - 1
}

fn numbers(text: &str, between: char) -> Option<[u64; 3]> {
    let parts: Option<Vec<u64>> = text.split(between).map(digits).collect();
    parts?.try_into().ok()
}

/// A number of at most nine digits and nothing else.
fn digits(text: &str) -> Option<u64> {
    let plain = (1..=9).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const AS_IT_IS: Scale = Scale { stretch: 1.0, shrink: 1.0, context: None };

    fn text(rows: &[&str]) -> String {
        format!("TIMESTAMP,ContextTokens,GeneratedTokens\n{}\n", rows.join("\n"))
    }

    fn scaled(text: &str, scale: &Scale) -> Trace {
        Recording::parse(text).unwrap().scaled(scale).unwrap()
    }

    #[test]
    fn times_count_from_the_first_request_across_days_and_months() {
        let rows = text(&[
            "2024-02-29 23:59:59.5,10,2",
            "2024-03-01T00:00:00.2500000Z,20,3",
            "2023-12-31 23:59:59.5+00:00,30,4",
        ]);
        let trace = scaled(&rows, &AS_IT_IS);
        let at: Vec<f64> = trace.arrivals.iter().map(|a| a.at.as_secs_f64()).collect();
        // The last line is the earliest; 60 days lie between the others and it.
        assert_eq!(at, [0.0, 60.0 * 86400.0, 60.0 * 86400.0 + 0.75]);
        let first = trace.arrivals[0];
        assert_eq!((first.prompt_tokens, first.max_tokens, trace.cut), (30, 4, 0));
    }

    #[test]
    fn what_is_cut_to_the_context_is_counted() {
        let rows = text(&["2023-11-16 18:15:46,800,0", "2023-11-16 18:15:48,4000,400"]);
        let scale = Scale { stretch: 0.5, shrink: 4.0, context: Some(128) };
        let trace = scaled(&rows, &scale);
        let arrival = |ms, prompt_tokens, max_tokens| Arrival {
            at: Duration::from_millis(ms),
            prompt_tokens,
            max_tokens,
        };
        assert_eq!(trace.arrivals, [arrival(0, 127, 1), arrival(1000, 64, 64)]);
        assert_eq!((trace.cut, trace.cut_tokens), (2, (200 - 127) + (1000 - 64) + (100 - 64)));
    }

    #[test]
    fn a_broken_line_is_named_with_its_reason() {
        let refuse = |text: &str, parts: &[&str]| {
            let error = format!("{:#}", Recording::parse(text).unwrap_err());
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        refuse("", &["line 1", "no column TIMESTAMP"]);
        refuse("TIMESTAMP,ContextTokens\n", &["line 1", "GeneratedTokens"]);
        refuse(&text(&[]), &["no request"]);
        let good = "2023-11-16 18:15:46.6805900,374,44";
        refuse(&text(&[good, "2023-11-16 18:15:46,x,4"]), &["line 3", "ContextTokens", "\"x\""]);
        refuse(
            &text(&[good, "", "2023-11-16 18:15:46,1"]),
            &["line 4", "GeneratedTokens is missing"],
        );
        for time in
            ["2023-13-16 18:15:46", "2023-11-16", "now", "2023-11-16 18:15:4é", "1-1-1 1:1:1."]
        {
            refuse(&text(&[&format!("{time},1,1")]), &["line 2", "TIMESTAMP"]);
        }
    }
}
