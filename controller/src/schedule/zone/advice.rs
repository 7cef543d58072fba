//! Advice for a time zone that does not exist.

use super::Tzdata;

/// Abbreviations that clocks show, with a place for each. They are no zone names: most stand for several zones, or for
/// half a year of one.
const ABBREVIATIONS: [(&str, &str); 34] = [
    ("ACST", "Australia/Darwin"),
    ("ACDT", "Australia/Adelaide"),
    ("AEDT", "Australia/Sydney"),
    ("AEST", "Australia/Sydney"),
    ("AKDT", "America/Anchorage"),
    ("AKST", "America/Anchorage"),
    ("ADT", "America/Halifax"),
    ("AST", "America/Halifax"),
    ("AWST", "Australia/Perth"),
    ("BRT", "America/Sao_Paulo"),
    ("BST", "Europe/London"),
    ("CAT", "Africa/Maputo"),
    ("CDT", "America/Chicago"),
    ("CEST", "Europe/Madrid"),
    ("CST", "America/Chicago"),
    ("EAT", "Africa/Nairobi"),
    ("EDT", "America/New_York"),
    ("EEST", "Europe/Helsinki"),
    ("HKT", "Asia/Hong_Kong"),
    ("IST", "Asia/Kolkata"),
    ("JST", "Asia/Tokyo"),
    ("KST", "Asia/Seoul"),
    ("MDT", "America/Denver"),
    ("MSK", "Europe/Moscow"),
    ("NDT", "America/St_Johns"),
    ("NST", "America/St_Johns"),
    ("NZDT", "Pacific/Auckland"),
    ("NZST", "Pacific/Auckland"),
    ("PDT", "America/Los_Angeles"),
    ("PKT", "Asia/Karachi"),
    ("PST", "America/Los_Angeles"),
    ("SAST", "Africa/Johannesburg"),
    ("SGT", "Asia/Singapore"),
    ("WEST", "Europe/Lisbon"),
];

/// Offsets that are no whole hours, in minutes, with a zone that has them.
const ODD_OFFSETS: [(i32, &str); 11] = [
    (-570, "Pacific/Marquesas"),
    (-210, "America/St_Johns"),
    (210, "Asia/Tehran"),
    (270, "Asia/Kabul"),
    (330, "Asia/Kolkata"),
    (345, "Asia/Kathmandu"),
    (390, "Asia/Yangon"),
    (525, "Australia/Eucla"),
    (570, "Australia/Darwin"),
    (630, "Australia/Lord_Howe"),
    (765, "Pacific/Chatham"),
];

/// Right letters for each wrong letter up to which a name counts as misspelt.
const LETTERS_FOR_A_MISTAKE: usize = 4;

/// Longer names than any existing one get general advice: the time of a comparison grows with the length.
const LONGEST: usize = 64;
/// Advice if no name is near.
const GENERAL: &str = "a zone is named by a place, for example Europe/Madrid; `timedatectl list-timezones` lists them";

/// Advice for a name that is no zone.
pub(in crate::schedule) fn advice(asked: &str) -> String {
    // The text is a caller's, and each name is compared with it.
    if asked.len() > LONGEST {
        return GENERAL.to_owned();
    }
    let data = Tzdata::of_process();
    let tidied = asked.trim().replace(' ', "_");
    // The most certain guess first: the right name in another spelling.
    if let Some(name) = data.names.iter().find(|name| name.eq_ignore_ascii_case(&tidied)) {
        return format!("did you mean {name}?");
    }
    if let Some(minutes) = offset(&tidied) {
        return for_offset(minutes);
    }
    if let Some((_, place)) = ABBREVIATIONS.iter().find(|(word, _)| word.eq_ignore_ascii_case(&tidied)) {
        return format!("it is what clocks show for a time; a zone is named by a place, for example {place}");
    }
    match nearest(data, &tidied) {
        Some(name) => format!("did you mean {name}?"),
        None => GENERAL.to_owned(),
    }
}

/// Minutes ahead of UTC: `+03:00`, `-0330`, `UTC+2`, `GMT-5`, `Z`.
fn offset(text: &str) -> Option<i32> {
    // A minus sign may be copied from a document as U+2212.
    let upper = text.to_ascii_uppercase().replace('\u{2212}', "-");
    if upper == "Z" {
        return Some(0);
    }
    let bare = ["UTC", "GMT"].iter().find_map(|word| upper.strip_prefix(word)).unwrap_or(&upper);
    let (sign, digits) = match bare.split_at_checked(1)? {
        ("+", digits) => (1, digits),
        ("-", digits) => (-1, digits),
        _ => return None,
    };
    let (hours, minutes) = match (digits.split_once(':'), digits.len()) {
        (Some(parts), _) => parts,
        (None, 4) => digits.split_at_checked(2)?,
        (None, _) => (digits, "0"),
    };
    let number = |text: &str| text.chars().all(|c| c.is_ascii_digit()).then(|| text.parse::<i32>().ok()).flatten();
    let (hours, minutes) = (number(hours)?, number(minutes)?);
    let ahead = hours.checked_mul(60)?.checked_add(minutes)?.checked_mul(sign)?;
    // No zone is further ahead than 14 hours.
    (hours <= 14 && minutes < 60).then_some(ahead)
}

fn for_offset(minutes: i32) -> String {
    let data = Tzdata::of_process();
    let hours = minutes / 60;
    // The signs of these names follow POSIX: ahead of UTC is minus.
    let fixed = match hours {
        0 => "UTC".to_owned(),
        ahead => format!("Etc/GMT{:+}", ahead.saturating_neg()),
    };
    if minutes % 60 == 0 && data.names.contains(&fixed) {
        let turned = if hours == 0 { "" } else { " (its sign is turned round)" };
        return format!(
            "this offset from UTC is {fixed}{turned}; where clocks change for summer, name a place, for example \
             Europe/Madrid"
        );
    }
    match ODD_OFFSETS.iter().find(|(odd, _)| *odd == minutes) {
        Some((_, place)) => format!("a zone is named by a place; one with this offset is {place}"),
        None => "no zone has this offset from UTC; a zone is named by a place, for example Europe/Madrid".to_owned(),
    }
}

/// The name with the fewest different letters, compared whole or without its continent.
fn nearest<'a>(data: &'a Tzdata, asked: &str) -> Option<&'a str> {
    let asked = asked.to_lowercase();
    let place_asked = asked.rsplit('/').next().unwrap_or_default();
    let distance = |name: &str| {
        let name = name.to_lowercase();
        let place = name.rsplit('/').next().unwrap_or_default();
        let whole = strsim::osa_distance(&asked, &name);
        // A caller with the right place and a wrong continent means the place.
        let by_place = strsim::osa_distance(place_asked, place).saturating_mul(2);
        // A short place resembles too many others.
        whole.min(if place_asked.len() > 3 { by_place.max(1) } else { whole })
    };
    let (best, wrong) = data.names.iter().map(|name| (name, distance(name))).min_by_key(|(_, wrong)| *wrong)?;
    (wrong <= asked.chars().count().checked_div(LETTERS_FOR_A_MISTAKE).unwrap_or_default().max(1))
        .then_some(best.as_str())
}
