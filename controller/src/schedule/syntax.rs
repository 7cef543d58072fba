//! Syntax of cron expressions: that of crontab(5), with `L`, `W` and `#` for days as in Quartz.
//!
//! Expressions are read strictly here, and passed to croner in a spelling that it understands as intended: croner
//! ignores empty items of a list, accepts names of days in any field, and never finds `7L`.

use std::fmt::Write as _;

/// The unit of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Second,
    Minute,
    Hour,
    Day,
    Month,
    Weekday,
}

/// Sunday is 0, and also 7.
const WEEKDAYS: [&str; 7] = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"];
/// January is 1.
const MONTHS: [&str; 12] = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"];
/// Whole expressions that many crons accept by name, with their meaning. They are refused with this advice.
const NICKNAMES: [(&str, &str); 6] = [
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
    ("@monthly", "0 0 1 * *"),
    ("@weekly", "0 0 * * 0"),
    ("@daily", "0 0 * * *"),
    ("@hourly", "0 * * * *"),
];

/// Longest expression, in bytes.
const LONGEST: usize = 256;

/// An item of a field's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Item {
    /// `5`, `1-5` or `*`, each with `/2`: first, last, and step.
    Range(u8, u8, u8),
    /// `L` for a day of the month: the last.
    LastDay,
    /// `15W`: the working day nearest to that day, in the same month.
    NearestWorkday(u8),
    /// `5L`: the last such day of the week in the month.
    LastWeekday(u8),
    /// `1#2`, `1-3#2`: the second such days of the week in the month.
    NthWeekday(u8, u8, u8),
}

/// A field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Field {
    pub(super) unit: Unit,
    pub(super) items: Vec<Item>,
    /// True if it begins with `*` or is `?`. As in cron, such a day field does not restrict by itself.
    pub(super) star: bool,
}

/// A whole expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Expression {
    pub(super) seconds: Field,
    pub(super) minutes: Field,
    pub(super) hours: Field,
    pub(super) days: Field,
    pub(super) months: Field,
    pub(super) weekdays: Field,
    /// True if a day must match both day fields; false: one of them.
    pub(super) both_days: bool,
}

impl Unit {
    const fn word(self) -> &'static str {
        match self {
            Self::Second => "second",
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::Day => "day of the month",
            Self::Month => "month",
            Self::Weekday => "day of the week",
        }
    }

    pub(super) const fn lowest(self) -> u8 {
        match self {
            Self::Second | Self::Minute | Self::Hour | Self::Weekday => 0,
            Self::Day | Self::Month => 1,
        }
    }

    const fn highest(self) -> u8 {
        match self {
            Self::Second | Self::Minute => 59,
            Self::Hour => 23,
            Self::Day => 31,
            Self::Month => 12,
            Self::Weekday => 7,
        }
    }

    const fn names(self) -> &'static [&'static str] {
        match self {
            Self::Month => &MONTHS,
            Self::Weekday => &WEEKDAYS,
            Self::Second | Self::Minute | Self::Hour | Self::Day => &[],
        }
    }

    /// Reads a number or a name of this field.
    fn value(self, text: &str) -> Result<u8, String> {
        let (low, high) = (self.lowest(), self.highest());
        if !text.is_empty() && text.chars().all(|c| c.is_ascii_digit()) {
            return text.parse().ok().filter(|number| (low..=high).contains(number)).ok_or_else(|| {
                // Quartz has a field for the year behind the day of the week.
                let year = if self == Self::Weekday && text.len() == 4 {
                    "; the sixth field is the day of the week, and there is none for the year"
                } else {
                    ""
                };
                format!("{text} is no {}: that is a number from {low} to {high}{year}", self.word())
            });
        }
        if let Some(place) = self.names().iter().position(|name| name.eq_ignore_ascii_case(text)) {
            return u8::try_from(place).map(|place| place.saturating_add(low)).map_err(|error| error.to_string());
        }
        // A name of another field is a frequent mistake; the error can name the right order.
        for other in [Self::Weekday, Self::Month] {
            let known = other.names().iter().find(|name| {
                text.get(..3).is_some_and(|start| start.eq_ignore_ascii_case(name))
                    && text.chars().all(|c| c.is_ascii_alphabetic())
            });
            let Some(name) = known else { continue };
            return Err(if other == self {
                format!("{text} is no {}; write {name}", self.word())
            } else {
                format!(
                    "{text} is a {}, and this field is the {}; the order is minute, hour, day of month, month, day of \
                     week, with the seconds before them if there are six, and no year",
                    other.word(),
                    self.word()
                )
            });
        }
        let names = if self.names().is_empty() { "" } else { ", or its first three letters in English" };
        Err(format!("{text:?} is no {}: that is a number from {low} to {high}{names}", self.word()))
    }

    fn range(self, text: &str) -> Result<(u8, u8), String> {
        let Some((from, to)) = text.split_once('-') else {
            return self.value(text).map(|value| (value, value));
        };
        let first = self.value(from)?;
        let mut last = self.value(to)?;
        // A week ends on a Sunday too, so `5-0` is a range.
        if self == Self::Weekday && last == 0 && first > 0 {
            last = 7;
        }
        if first > last {
            return Err(format!("{text} runs backwards; write it as two ranges with a comma between them"));
        }
        Ok((first, last))
    }

    fn item(self, text: &str) -> Result<Item, String> {
        let upper = text.to_ascii_uppercase();
        if self == Self::Day {
            if upper == "L" {
                return Ok(Item::LastDay);
            }
            if let Some(day) = upper.strip_suffix('W') {
                return self.value(day).map(Item::NearestWorkday);
            }
        }
        if self == Self::Weekday {
            if let Some((days, which)) = upper.split_once('#') {
                let (first, last) = self.range(days)?;
                return match which {
                    "L" if first == last => Ok(Item::LastWeekday(first)),
                    "1" => Ok(Item::NthWeekday(first, last, 1)),
                    "2" => Ok(Item::NthWeekday(first, last, 2)),
                    "3" => Ok(Item::NthWeekday(first, last, 3)),
                    "4" => Ok(Item::NthWeekday(first, last, 4)),
                    "5" => Ok(Item::NthWeekday(first, last, 5)),
                    _ => Err(format!("{text}: after # stands 1 to 5, for example 1#2, the second Monday of the month")),
                };
            }
            match upper.strip_suffix('L') {
                Some("") => {
                    return Err("L needs a day of the week before it: 5L is the last Friday of the month".to_owned());
                }
                Some(day) => return self.value(day).map(Item::LastWeekday),
                None => {}
            }
        }
        let (range, step) = match upper.split_once('/') {
            Some((range, step)) => {
                // `parse` alone would accept `+5`.
                let digits = !step.is_empty() && step.chars().all(|c| c.is_ascii_digit());
                let step = step.parse().ok().filter(|step: &u8| digits && *step > 0).ok_or_else(|| {
                    format!("{text}: after / stands how far apart, for example */15, a number from 1 to 255")
                })?;
                (range, Some(step))
            }
            None => (upper.as_str(), None),
        };
        let (first, last) = match range {
            // Up to 6 for days of the week: 7 is Sunday again.
            "*" => (self.lowest(), if self == Self::Weekday { 6 } else { self.highest() }),
            // As in Quartz: from this value to the end.
            single if step.is_some() && !single.contains('-') => (self.value(single)?, self.highest()),
            range => self.range(range)?,
        };
        Ok(Item::Range(first, last, step.unwrap_or(1)))
    }

    fn field(self, text: &str) -> Result<Field, String> {
        let of_days = matches!(self, Self::Day | Self::Weekday);
        // Quartz's way to leave one of the two day fields open.
        if text == "?" && of_days {
            return Ok(Field { star: true, ..self.field("*")? });
        }
        let items = text
            .split(',')
            .map(|item| {
                if item.is_empty() {
                    return Err(format!(
                        "an item of the list {text:?} is empty; a list is written without spaces: 1,3"
                    ));
                }
                self.item(item)
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Field { unit: self, items, star: text.starts_with('*') })
    }
}

impl Field {
    /// The numbers of plain items, lowest first; Sunday is 0.
    pub(super) fn numbers(&self) -> Vec<u8> {
        let mut numbers: Vec<u8> = self
            .items
            .iter()
            .filter_map(|item| match item {
                Item::Range(first, last, step) => Some((*first..=*last).step_by(usize::from(*step))),
                _ => None,
            })
            .flatten()
            .map(|number| if self.unit == Unit::Weekday { sunday_is_0(number) } else { number })
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }

    /// True if every number of the unit is in the field.
    pub(super) fn is_all(&self) -> bool {
        let highest = if self.unit == Unit::Weekday { 6 } else { self.unit.highest() };
        self.numbers().iter().copied().eq(self.unit.lowest()..=highest)
    }

    /// The spelling for croner. A lone `*` is kept, because it has a meaning of its own for days.
    fn spelled_out(&self) -> String {
        let of_days = matches!(self.unit, Unit::Day | Unit::Weekday);
        // croner treats `*` and `1-31` of a day field differently, as cron does.
        if self.is_all() && (self.star || !of_days) {
            return "*".to_owned();
        }
        let mut text = self.numbers().iter().map(u8::to_string).collect::<Vec<_>>().join(",");
        let mut add = |item: String| {
            let comma = if text.is_empty() { "" } else { "," };
            let _ = write!(text, "{comma}{item}");
        };
        for item in &self.items {
            match item {
                Item::Range(..) => {}
                Item::LastDay => add("L".to_owned()),
                Item::NearestWorkday(day) => add(format!("{day}W")),
                Item::LastWeekday(day) => add(format!("{}L", sunday_is_0(*day))),
                Item::NthWeekday(first, last, which) => {
                    // croner has no ranges before `#`.
                    (*first..=*last).for_each(|day| add(format!("{}#{which}", sunday_is_0(day))));
                }
            }
        }
        text
    }
}

fn sunday_is_0(day: u8) -> u8 {
    if day == 7 { 0 } else { day }
}

impl Expression {
    /// Reads an expression.
    ///
    /// # Errors
    /// Returns the defect, with a correction.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        // Before anything is split, because the text is a caller's.
        if text.len() > LONGEST {
            return Err(format!("it must be at most {LONGEST} bytes"));
        }
        let fields: Vec<&str> = text.split_whitespace().collect();
        let (seconds, [minutes, hours, days, months, weekdays]) = match fields.as_slice() {
            [minutes, hours, days, months, weekdays] => ("0", [*minutes, *hours, *days, *months, *weekdays]),
            [seconds, minutes, hours, days, months, weekdays] => {
                (*seconds, [*minutes, *hours, *days, *months, *weekdays])
            }
            other => return Err(wrong_number(other)),
        };
        // croner's extension `+` was accepted by earlier releases, so stored schedules may have it.
        let (both, weekdays) = weekdays.strip_prefix('+').map_or((false, weekdays), |rest| (true, rest));
        let (days, weekdays) = (Unit::Day.field(days)?, Unit::Weekday.field(weekdays)?);
        Ok(Self {
            seconds: Unit::Second.field(seconds)?,
            minutes: Unit::Minute.field(minutes)?,
            hours: Unit::Hour.field(hours)?,
            months: Unit::Month.field(months)?,
            // As crontab(5) of vixie and cronie: a day field that begins with `*` does not restrict by itself.
            both_days: both || days.star || weekdays.star,
            days,
            weekdays,
        })
    }

    /// The spelling for croner's parser.
    pub(super) fn spelled_out(&self) -> String {
        [&self.seconds, &self.minutes, &self.hours, &self.days, &self.months, &self.weekdays]
            .map(Field::spelled_out)
            .join(" ")
    }
}

fn wrong_number(fields: &[&str]) -> String {
    if let [word] = fields
        && let Some((_, meant)) = NICKNAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(word))
    {
        return format!("it has 1 field; write {meant:?} for {word}");
    }
    format!(
        "it has {} field{}; it needs 5 (minute, hour, day of month, month, day of week), or 6 with the seconds first",
        fields.len(),
        if fields.len() == 1 { "" } else { "s" },
    )
}

#[cfg(test)]
mod tests {
    use super::Expression;

    #[test]
    fn croner_is_given_what_it_reads_as_it_is_meant() {
        for (text, spelled) in [
            ("0 2 * * 7L", "0 0 2 * * 0L"),
            ("0 2 * * 1,7L", "0 0 2 * * 1,0L"),
            ("0 2 * * SUNL", "0 0 2 * * 0L"),
            ("0 2 * * sun#L", "0 0 2 * * 0L"),
            ("0 2 * * FRI-SUN", "0 0 2 * * 0,5,6"),
            ("0 2 * * 6-7#2", "0 0 2 * * 6#2,0#2"),
            ("0 2 ? JAN-MAR/2 ?", "0 0 2 * 1,3 *"),
            (
                "*/30 0 2 1-31 * 0-7",
                "0,30 0 2 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31 * 0,1,2,3,4,5,6",
            ),
            ("5/20 *,5 8-10 L,15W,3 * *", "5,25,45 * 8,9,10 3,L,15W * *"),
            ("0 3 */10 * +1", "0 0 3 1,11,21,31 * 1"),
        ] {
            let spelled_out = Expression::parse(text).map(|expression| expression.spelled_out());
            assert_eq!(spelled_out.as_deref(), Ok(spelled), "{text}");
        }
    }

    #[test]
    fn endless_expression_is_refused() {
        for text in [format!("0 3 * * {}1", "1,".repeat(1 << 19)), "* ".repeat(1 << 19)] {
            assert_eq!(Expression::parse(&text), Err("it must be at most 256 bytes".to_owned()));
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_what_would_be_right() {
        for (text, said) in [
            ("45 12 * * TUE,THU *", "TUE is a day of the week, and this field is the month"),
            ("0 12 * * MONDAY", "MONDAY is no day of the week; write MON"),
            ("0 12 MON * *", "MON is a day of the week, and this field is the day of the month"),
            ("0 12 * * JAN", "JAN is a month, and this field is the day of the week"),
            ("0 3 * * 1, 3", "an item of the list \"1,\" is empty"),
            ("0 3 * * ,1", "an item of the list \",1\" is empty"),
            ("0,,5 3 * * 1", "an item of the list \"0,,5\" is empty"),
            ("0 2 * * L", "5L is the last Friday"),
            ("0 2 * * 1,L", "5L is the last Friday"),
            ("0 L * * *", "\"L\" is no hour"),
            ("L 2 * * *", "\"L\" is no minute"),
            ("0 2 * L *", "\"L\" is no month"),
            ("0 2 LW * *", "\"L\" is no day of the month"),
            ("0 2 5L * *", "\"5L\" is no day of the month"),
            ("0 2 * * 15W", "\"15W\" is no day of the week"),
            ("0 2 * * 1#6", "after # stands 1 to 5"),
            ("0 2 * * 1#+1", "after # stands 1 to 5"),
            ("0 2 * * 8", "8 is no day of the week"),
            ("0 0 2 * * 2026", "none for the year"),
            ("60 * * * *", "60 is no minute: that is a number from 0 to 59"),
            ("* 24 * * *", "24 is no hour"),
            ("* * 0 * *", "0 is no day of the month"),
            ("* * * 13 *", "13 is no month"),
            ("5-1 * * * *", "runs backwards"),
            ("* * * * SAT-MON", "runs backwards"),
            ("*/0 * * * *", "after / stands how far apart"),
            ("*/+5 * * * *", "after / stands how far apart"),
            ("*/ * * * *", "after / stands how far apart"),
            ("+5 * * * *", "\"+5\" is no minute"),
            ("? * * * *", "\"?\" is no minute"),
            ("5-? * * * *", "\"?\" is no minute"),
            ("\u{661} * * * *", "is no minute"),
            ("@daily", "write \"0 0 * * *\""),
            ("@reboot", "it has 1 field;"),
            ("", "it has 0 fields"),
        ] {
            let why = Expression::parse(text).unwrap_err();
            assert!(why.contains(said), "{text}: {why}");
        }
    }
}
