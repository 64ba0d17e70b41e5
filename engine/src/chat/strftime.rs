//! Python's `strftime` for the C locale, for templates that print today's date.
//!
//! Input: seconds since 1970 in the time zone that is to be printed; the engine has no clock of
//! its own. Not here: time zones. A directive that is not known is an error, never left out.

const DAYS: [&str; 7] =
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// A moment taken apart.
struct Moment {
    year: i64,
    /// 1 to 12.
    month: usize,
    /// 1 to 31.
    day: i64,
    /// 1 to 366.
    day_of_year: i64,
    /// 0 is Monday.
    weekday: usize,
    /// 0 to 86399.
    second_of_day: i64,
}

/// `seconds` written as `format` says; the error names what is not supported.
pub(super) fn format(seconds: i64, format: &str) -> Result<String, String> {
    let moment = Moment::new(seconds)?;
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(letter) = rest.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        match rest.next() {
            // A minus sign leaves out leading zeros.
            Some('-') => {
                let text = moment.directive(rest.next())?;
                let digits = text.trim_start_matches('0');
                out += if digits.is_empty() { "0" } else { digits };
            }
            directive => out += &moment.directive(directive)?,
        }
    }
    Ok(out)
}

impl Moment {
    /// Days to a date of the Gregorian calendar: whole cycles of 400 years, then 100, 4 and 1,
    /// counted from 1 March 2000, so that a leap day is the last day of its year.
    fn new(seconds: i64) -> Result<Self, String> {
        let days = seconds.div_euclid(86_400);
        // Years 1 to 9999, as Python's.
        if !(-719_162..=2_932_896).contains(&days) {
            return Err(format!("the time {seconds} is outside the years 1 to 9999"));
        }
        let since = days - 11_017;
        let (cycles, day) = (since.div_euclid(146_097), since.rem_euclid(146_097));
        let centuries = (day / 36_524).min(3);
        let day = day - centuries * 36_524;
        let (fours, day) = (day / 1_461, day % 1_461);
        let years = (day / 365).min(3);
        let mut day = day - years * 365;
        let mut year = 2000 + cycles * 400 + centuries * 100 + fours * 4 + years;
        let mut month = 3;
        while day >= month_len(year + i64::from(month < 3), month) {
            day -= month_len(year + i64::from(month < 3), month);
            month = month % 12 + 1;
        }
        year += i64::from(month < 3);
        let before: i64 = (1..month).map(|m| month_len(year, m)).sum();
        Ok(Self {
            year,
            month,
            day: day + 1,
            day_of_year: before + day + 1,
            weekday: (days + 3).rem_euclid(7) as usize,
            second_of_day: seconds.rem_euclid(86_400),
        })
    }

    fn directive(&self, directive: Option<char>) -> Result<String, String> {
        let (hour, minute) = (self.second_of_day / 3600, self.second_of_day / 60 % 60);
        let second = self.second_of_day % 60;
        let two = |number: i64| format!("{number:02}");
        Ok(match directive {
            Some('Y') => self.year.to_string(),
            Some('y') => two(self.year % 100),
            Some('m') => two(self.month as i64),
            Some('B') => MONTHS[self.month - 1].into(),
            Some('b' | 'h') => MONTHS[self.month - 1][..3].into(),
            Some('d') => two(self.day),
            Some('e') => format!("{:2}", self.day),
            Some('j') => format!("{:03}", self.day_of_year),
            Some('A') => DAYS[self.weekday].into(),
            Some('a') => DAYS[self.weekday][..3].into(),
            Some('u') => (self.weekday + 1).to_string(),
            Some('w') => ((self.weekday + 1) % 7).to_string(),
            Some('H') => two(hour),
            Some('I') => two((hour + 11) % 12 + 1),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('F') => format!("{}-{:02}-{:02}", self.year, self.month, self.day),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('R') => format!("{hour:02}:{minute:02}"),
            Some('D') => format!("{:02}/{:02}/{:02}", self.month, self.day, self.year % 100),
            Some('%') => "%".into(),
            Some(other) => return Err(format!("strftime directive %{other} is not supported")),
            None => return Err("a strftime format ends in %".into()),
        })
    }
}

fn month_len(year: i64, month: usize) -> i64 {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    [31, 28 + i64::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values printed by Python: `datetime.fromtimestamp(s, UTC).strftime(...)`.
    #[test]
    fn prints_as_python() {
        let all = "%Y %y %m %B %b %d %e %j %A %a %u %w %H %I %M %S %p %F %T %%";
        for (seconds, expected) in [
            (
                0,
                "1970 70 01 January Jan 01  1 001 Thursday Thu 4 4 00 12 00 00 AM 1970-01-01 00:00:00 %",
            ),
            (
                951782399,
                "2000 00 02 February Feb 28 28 059 Monday Mon 1 1 23 11 59 59 PM 2000-02-28 23:59:59 %",
            ),
            (
                951782400,
                "2000 00 02 February Feb 29 29 060 Tuesday Tue 2 2 00 12 00 00 AM 2000-02-29 00:00:00 %",
            ),
            (
                951868800,
                "2000 00 03 March Mar 01  1 061 Wednesday Wed 3 3 00 12 00 00 AM 2000-03-01 00:00:00 %",
            ),
            (
                1750000000,
                "2025 25 06 June Jun 15 15 166 Sunday Sun 7 0 15 03 06 40 PM 2025-06-15 15:06:40 %",
            ),
            (
                -1,
                "1969 69 12 December Dec 31 31 365 Wednesday Wed 3 3 23 11 59 59 PM 1969-12-31 23:59:59 %",
            ),
            (
                4107542399,
                "2100 00 02 February Feb 28 28 059 Sunday Sun 7 0 23 11 59 59 PM 2100-02-28 23:59:59 %",
            ),
            (
                4107542400,
                "2100 00 03 March Mar 01  1 060 Monday Mon 1 1 00 12 00 00 AM 2100-03-01 00:00:00 %",
            ),
            (
                1709208000,
                "2024 24 02 February Feb 29 29 060 Thursday Thu 4 4 12 12 00 00 PM 2024-02-29 12:00:00 %",
            ),
            (
                1735689599,
                "2024 24 12 December Dec 31 31 366 Tuesday Tue 2 2 23 11 59 59 PM 2024-12-31 23:59:59 %",
            ),
        ] {
            assert_eq!(format(seconds, all).as_deref(), Ok(expected), "{seconds}");
        }
        assert_eq!(format(1_749_000_000, "%-d %-m %-H").as_deref(), Ok("4 6 1"));
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let mut last = Moment::new(-62_135_596_800).ok();
        for day in -719_161..=2_932_896i64 {
            let next = Moment::new(day * 86_400).ok();
            let (a, b) = (last.as_ref().unwrap(), next.as_ref().unwrap());
            let same_month = a.year == b.year && a.month == b.month && a.day + 1 == b.day;
            assert!(same_month || (b.day == 1 && a.day == month_len(a.year, a.month)), "{day}");
            assert!(b.day_of_year == a.day_of_year + 1 || b.day_of_year == 1, "{day}");
            last = next;
        }
    }

    #[test]
    fn what_cannot_be_printed_is_named() {
        assert_eq!(format(0, "%Q"), Err("strftime directive %Q is not supported".into()));
        assert!(format(0, "%").is_err());
        assert!(format(i64::MAX, "%Y").is_err());
        assert!(format(i64::MIN, "%Y").is_err());
    }
}
