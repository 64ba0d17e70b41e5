//! Regular expressions of JSON schemas in the parser's syntax, and expressions for formats.
//!
//! Input: expressions of ECMA-262, which is what the standard asks for; the parser's are those of
//! the `regex` crate. Not here: where they stand in a schema ([`super::schema`]).

/// White space of ECMA-262: the parser's lacks the last one and has U+0085.
const SPACE: &str =
    r"\t\n\x0B\x0C\r \xA0\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}\u{3000}\u{FEFF}";
/// What `.` does not match.
const LINE_ENDS: &str = r"\n\r\u{2028}\u{2029}";

/// The same expression in the parser's syntax.
///
/// # Errors
/// What ECMA-262 reads in another way and cannot be put right.
pub(super) fn expression(pattern: &str) -> Result<String, String> {
    let (mut out, mut chars) = (String::new(), pattern.chars().peekable());
    let mut in_class = false;
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('s') => out += &format!("[{SPACE}]"),
                Some('S') => out += &format!("[^{SPACE}]"),
                // Letters that mean something to the parser alone.
                Some(c @ ('A' | 'a' | 'z' | 'Z')) => {
                    return Err(format!("pattern {pattern:?} is not supported: \\{c}"));
                }
                Some(c) => out.extend(['\\', c]),
                None => return Err(format!("pattern {pattern:?} ends in a backslash")),
            },
            '.' if !in_class => out += &format!("[^{LINE_ENDS}]"),
            '[' if !in_class => {
                in_class = true;
                out.push('[');
                if chars.peek() == Some(&'^') {
                    out.extend(chars.next());
                }
                if chars.peek() == Some(&']') {
                    return Err(format!("pattern {pattern:?} is not supported: an empty class"));
                }
            }
            // Sets within sets.
            '[' | '&' | '~' if in_class => out.extend(['\\', c]),
            ']' => {
                in_class = false;
                out.push(']');
            }
            c => out.push(c),
        }
    }
    Ok(out)
}

/// An expression that all its texts are of this format by. None if the parser's own is as good, or
/// it has none.
///
/// Of dates the 29th of February is left out, of times leap seconds, of host names what has to be
/// looked up in tables (labels with two hyphens).
pub(super) fn of_format(format: &str) -> Option<String> {
    const DATE: &str = "[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|\
                        (?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))";
    const TIME: &str = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])";
    let label = "(?:[a-zA-Z][a-zA-Z0-9]{0,60}|[a-zA-Z](?:-?[a-zA-Z0-9]){0,30})";
    let host = format!(r"{label}(?:\.{label}){{0,3}}");
    let local = "[a-zA-Z0-9!#$%&'*+/=?^_{|}~-]{1,20}";
    let whole = match format {
        "date" => DATE.to_owned(),
        "time" => TIME.to_owned(),
        "date-time" => format!("{DATE}[tT]{TIME}"),
        "hostname" => host,
        "email" => format!(r"{local}(?:\.{local}){{0,2}}@{host}"),
        _ => return None,
    };
    Some(format!("^(?:{whole})$"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_of_ecma_are_rewritten() {
        for (ecma, ours) in [
            (r"^a\.b/[c-d\]]$", r"^a\.b/[c-d\]]$"),
            ("[[&&~]", r"[\[\&\&\~]"),
            (r"\d\w\x41", r"\d\w\x41"),
        ] {
            assert_eq!(expression(ecma).unwrap(), ours);
        }
        assert_eq!(expression(r"\s").unwrap(), format!("[{SPACE}]"));
        assert_eq!(expression(r"[a\s]").unwrap(), format!("[a[{SPACE}]]"));
        assert_eq!(expression(r"[^\S]").unwrap(), format!("[^[^{SPACE}]]"));
        assert_eq!(expression("a.").unwrap(), format!("a[^{LINE_ENDS}]"));
        for refused in [r"\", "[]a]", "[^]", r"a\Z", r"\A"] {
            assert!(expression(refused).is_err(), "{refused}");
        }
    }
}
