//! Cron expressions in words.

use std::fmt;

use super::syntax::{Expression, Field, Item};

/// Largest number of times of a day that are named one by one.
const TIMES: usize = 6;
/// Largest number of equally spaced numbers that are all named.
const NUMBERS: usize = 4;

const WEEKDAYS: [&str; 8] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const MONTHS: [&str; 13] = [
    "",
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

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = self.time();
        f.write_str(&time)?;
        match self.date() {
            Some(date) => write!(f, ", {date}"),
            // A time of day needs a day; an interval like `every 15 minutes` does not.
            None if time.starts_with("at ") && !time.contains(" each ") => f.write_str(" every day"),
            None => Ok(()),
        }?;
        if self.months.is_all() {
            return Ok(());
        }
        write!(f, ", in {}", list(&self.months.numbers(), |month| name(&MONTHS, month)))
    }
}

impl Expression {
    fn time(&self) -> String {
        let (seconds, minutes, hours) = (self.seconds.numbers(), self.minutes.numbers(), self.hours.numbers());
        let each_hour = self.hours.is_all();
        let of_hours = match (each_hour, hours.as_slice()) {
            (true, _) => "each hour".to_owned(),
            (false, [hour]) => format!("hour {hour}"),
            (false, _) => format!("the hours {}", numbers(&hours)),
        };
        // Without seconds, as most expressions are; then a time is `03:00`.
        if seconds == [0] {
            // A few times of a day are clearer than a pattern.
            if !each_hour && minutes.len().saturating_mul(hours.len()) <= TIMES {
                let times: Vec<String> = hours
                    .iter()
                    .flat_map(|hour| minutes.iter().map(move |minute| format!("{hour:02}:{minute:02}")))
                    .collect();
                return format!("at {}", joined(&times));
            }
            return match (every(&self.minutes, "minute"), each_hour) {
                (Some(often), true) => often,
                (Some(often), false) => format!("{often} of {of_hours}"),
                (None, _) => format!("at {} of {of_hours}", counted("minute", &minutes)),
            };
        }
        let often = every(&self.seconds, "second");
        let often = often.unwrap_or_else(|| format!("at {}", counted("second", &seconds)));
        match (self.minutes.is_all(), each_hour) {
            (true, true) if often.starts_with("every ") => often,
            (true, true) => format!("{often} of each minute"),
            (true, false) => format!("{often}, each minute of {of_hours}"),
            (false, _) => format!("{often} of {} of {of_hours}", counted("minute", &minutes)),
        }
    }

    fn date(&self) -> Option<String> {
        // `1-31` has no star: cron then takes a day that matches either field.
        let any_day = self.days.star && self.days.is_all();
        let any_weekday = self.weekdays.star && self.weekdays.is_all();
        match (any_day, any_weekday) {
            (true, true) => None,
            (true, false) => Some(format!("on {}", weekdays(&self.weekdays))),
            (false, true) => Some(format!("on {}", days(&self.days))),
            (false, false) if self.both_days => {
                Some(format!("on {}, if that is {}", days(&self.days), weekdays(&self.weekdays)))
            }
            (false, false) => Some(format!("on {}, and also on {}", days(&self.days), weekdays(&self.weekdays))),
        }
    }
}

/// `every 15 minutes`, for equally spaced times over the whole range.
fn every(field: &Field, unit: &str) -> Option<String> {
    let found = field.numbers();
    if field.is_all() {
        return Some(format!("every {unit}"));
    }
    let [first, second, ..] = found.as_slice() else { return None };
    let step = second.checked_sub(*first)?;
    // Only steps that divide an hour: `*/25` fires at 0, 25 and 50, which is not every 25 minutes.
    let whole = 60_u8.checked_rem(step) == Some(0) && *first == 0;
    (whole && found.iter().copied().eq((0..60).step_by(usize::from(step)))).then(|| format!("every {step} {unit}s"))
}

fn days(field: &Field) -> String {
    let found = field.numbers();
    let mut parts = Vec::new();
    if !found.is_empty() {
        parts.push(counted("day", &found));
    }
    for item in &field.items {
        match item {
            Item::LastDay => parts.push("the last day".to_owned()),
            Item::NearestWorkday(day) => parts.push(format!("the working day nearest to day {day}")),
            Item::Range(..) | Item::LastWeekday(_) | Item::NthWeekday(..) => {}
        }
    }
    format!("{} of the month", joined(&parts))
}

fn weekdays(field: &Field) -> String {
    // Weeks are read from Monday on.
    let mut found: Vec<u8> = field.numbers().into_iter().map(|day| if day == 0 { 7 } else { day }).collect();
    found.sort_unstable();
    let day_name = |day| name(&WEEKDAYS, day);
    let mut parts = Vec::new();
    if !found.is_empty() {
        parts.push(list(&found, day_name));
    }
    for item in &field.items {
        match item {
            Item::LastWeekday(day) => parts.push(format!("the last {} of the month", day_name(*day))),
            Item::NthWeekday(first, last, which) => {
                let ending = ["th", "st", "nd", "rd"].get(usize::from(*which)).unwrap_or(&"th");
                let days: Vec<u8> = (*first..=*last).collect();
                parts.push(format!("the {which}{ending} {} of the month", list(&days, day_name)));
            }
            Item::Range(..) | Item::LastDay | Item::NearestWorkday(_) => {}
        }
    }
    joined(&parts)
}

fn name(names: &[&str], number: u8) -> String {
    names.get(usize::from(number)).map_or_else(|| number.to_string(), |name| (*name).to_owned())
}

/// `minute 5`, `the minutes 5 and 10`.
fn counted(unit: &str, found: &[u8]) -> String {
    match found {
        [one] => format!("{unit} {one}"),
        more => format!("the {unit}s {}", numbers(more)),
    }
}

/// Numbers, shortened if they are equally spaced.
fn numbers(found: &[u8]) -> String {
    let apart = |pair: &[u8]| match pair {
        [one, two] => two.saturating_sub(*one),
        _ => 0,
    };
    let step = found.windows(2).next().map_or(0, apart);
    if let [first, second, .., last] = found
        && step > 1
        && found.len() > NUMBERS
        && found.windows(2).all(|pair| apart(pair) == step)
    {
        return format!("{first}, {second} and so on to {last}");
    }
    list(found, |number| number.to_string())
}

/// A list in which three or more consecutive numbers are a range.
fn list(found: &[u8], name: impl Fn(u8) -> String) -> String {
    let mut runs: Vec<(u8, u8)> = Vec::new();
    for number in found {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*number) => *last = *number,
            _ => runs.push((*number, *number)),
        }
    }
    let mut parts = Vec::new();
    for (first, last) in runs {
        match last.saturating_sub(first) {
            0 => parts.push(name(first)),
            1 => parts.extend([name(first), name(last)]),
            _ => parts.push(format!("{} to {}", name(first), name(last))),
        }
    }
    joined(&parts)
}

fn joined(parts: &[String]) -> String {
    match parts {
        [] => String::new(),
        [one] => one.clone(),
        [front @ .., last] => format!("{} and {last}", front.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::Expression;

    #[test]
    fn an_expression_is_said_in_words() {
        for (cron, words) in [
            ("0 3 * * *", "at 03:00 every day"),
            ("0,30 2 * * *", "at 02:00 and 02:30 every day"),
            ("* * * * *", "every minute"),
            ("*/15 * * * *", "every 15 minutes"),
            ("*/25 * * * *", "at the minutes 0, 25 and 50 of each hour"),
            ("*/90 * * * *", "at minute 0 of each hour"),
            ("5 * * * *", "at minute 5 of each hour"),
            ("* * * * * *", "every second"),
            ("*/5 * * * * *", "every 5 seconds"),
            ("7 * * * * *", "at second 7 of each minute"),
            ("45 12 * * 2,4 *", "at second 45 of minute 12 of each hour, in February and April"),
            ("0 */2 * * *", "at minute 0 of the hours 0, 2 and so on to 22 every day"),
            ("*/10 8-18 * * MON-FRI", "every 10 minutes of the hours 8 to 18, on Monday to Friday"),
            ("0 3 */2 * 1", "at 03:00, on the days 1, 3 and so on to 31 of the month, if that is Monday"),
            ("0 3 1,15 * 1", "at 03:00, on the days 1 and 15 of the month, and also on Monday"),
            ("0 2 * * 7L", "at 02:00, on the last Sunday of the month"),
            ("0 2 * * 1,7L", "at 02:00, on Monday and the last Sunday of the month"),
            ("0 2 L,15W * *", "at 02:00, on the last day and the working day nearest to day 15 of the month"),
            ("0 2 * * 1#2", "at 02:00, on the 2nd Monday of the month"),
            ("0 2 * 6-8,12 SAT,SUN", "at 02:00, on Saturday and Sunday, in June to August and December"),
            ("0 3 1-31 * 1", "at 03:00, on the days 1 to 31 of the month, and also on Monday"),
            ("0 0 29 2 ?", "at 00:00, on day 29 of the month, in February"),
        ] {
            let said = Expression::parse(cron).map(|expression| expression.to_string());
            assert_eq!(said.as_deref(), Ok(words), "{cron}");
        }
    }
}
