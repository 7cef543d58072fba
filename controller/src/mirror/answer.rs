//! The answer to a request for a file, by the request's conditions: RFC 9110, sections 13 and 14.

use std::ops::{Bound, Range};
use std::time::SystemTime;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use headers::{
    AcceptRanges, ContentLength, ContentRange, ContentType, ETag, HeaderMapExt as _, IfMatch, IfModifiedSince,
    IfNoneMatch, IfRange, IfUnmodifiedSince, LastModified,
};

use super::body::{Reader, bytes};
use crate::artifacts::{BlobReader, Digest};

/// The file to send.
pub(super) struct File {
    pub(super) reader: BlobReader,
    /// Its entity tag: equal bytes have an equal one on every controller.
    pub(super) digest: Digest,
    /// Time at which the artifact was pushed.
    pub(super) modified: SystemTime,
    pub(super) content_type: &'static str,
}

/// The answer that a request's headers ask for.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Whole,
    Part(Range<u64>),
    NotModified,
    PreconditionFailed,
    NotSatisfiable,
}

impl File {
    /// The answer to a request with these headers.
    pub(super) fn answer(self, request: &HeaderMap, reader: Reader) -> Response {
        let size = self.reader.size();
        let modified = LastModified::from(self.modified);
        // A digest in quotes is always a tag.
        let tag = format!("\"{}\"", self.digest).parse::<ETag>().ok();
        let verdict = tag.as_ref().map_or(Verdict::Whole, |tag| judge(request, tag, self.modified, size));
        let (status, range) = match verdict {
            Verdict::Whole => (StatusCode::OK, Some(0..size)),
            Verdict::Part(range) => (StatusCode::PARTIAL_CONTENT, Some(range)),
            Verdict::NotModified => (StatusCode::NOT_MODIFIED, None),
            Verdict::PreconditionFailed => (StatusCode::PRECONDITION_FAILED, None),
            Verdict::NotSatisfiable => (StatusCode::RANGE_NOT_SATISFIABLE, None),
        };
        let mut response = match range.clone() {
            Some(range) => (status, Body::from_stream(bytes(self.reader, range, reader))).into_response(),
            None => status.into_response(),
        };
        let headers = response.headers_mut();
        if let Some(tag) = tag {
            headers.typed_insert(tag);
        }
        headers.typed_insert(modified);
        headers.typed_insert(AcceptRanges::bytes());
        match range {
            Some(range) => {
                if let Ok(content_type) = self.content_type.parse::<ContentType>() {
                    headers.typed_insert(content_type);
                }
                headers.typed_insert(ContentLength(range.end - range.start));
                if status == StatusCode::PARTIAL_CONTENT
                    && let Ok(content_range) = ContentRange::bytes(range, size)
                {
                    headers.typed_insert(content_range);
                }
            }
            None if status == StatusCode::RANGE_NOT_SATISFIABLE => {
                headers.typed_insert(ContentRange::unsatisfied_bytes(size));
            }
            None => {}
        }
        response
    }
}

fn judge(request: &HeaderMap, tag: &ETag, modified: SystemTime, size: u64) -> Verdict {
    let failed = match request.typed_get::<IfMatch>() {
        Some(condition) => !condition.precondition_passes(tag),
        None => request
            .typed_get::<IfUnmodifiedSince>()
            .is_some_and(|condition| !condition.precondition_passes(whole_seconds(modified))),
    };
    if failed {
        return Verdict::PreconditionFailed;
    }
    let unchanged = match request.typed_get::<IfNoneMatch>() {
        Some(condition) => !condition.precondition_passes(tag),
        None => request
            .typed_get::<IfModifiedSince>()
            .is_some_and(|condition| !condition.is_modified(whole_seconds(modified))),
    };
    if unchanged {
        return Verdict::NotModified;
    }
    let Some(range) = request.typed_get::<headers::Range>() else { return Verdict::Whole };
    let other_bytes = request
        .typed_get::<IfRange>()
        .is_some_and(|condition| condition.is_modified(Some(tag), Some(&LastModified::from(modified))));
    if other_bytes { Verdict::Whole } else { part(&range, size) }
}

/// Dates in headers have no fractions of a second.
fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(since.as_secs())
}

/// Serves one range. Several ranges, or malformed ones, get the whole file: RFC 9110 allows that, and no installer
/// asks for them.
fn part(range: &headers::Range, size: u64) -> Verdict {
    let mut ranges = range.satisfiable_ranges(size);
    let (Some((first, last)), None) = (ranges.next(), ranges.next()) else { return Verdict::Whole };
    let Bound::Included(first) = first else { return Verdict::Whole };
    let end = match last {
        Bound::Included(last) if last < first => return Verdict::Whole,
        Bound::Included(last) => last.saturating_add(1).min(size),
        Bound::Excluded(_) | Bound::Unbounded => size,
    };
    if first < size { Verdict::Part(first..end) } else { Verdict::NotSatisfiable }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use axum::http::HeaderMap;
    use headers::ETag;

    use super::{Verdict, judge};

    const PUSHED: SystemTime = SystemTime::UNIX_EPOCH;

    fn verdict(headers: &[(&'static str, &str)]) -> Verdict {
        let mut request = HeaderMap::new();
        for (name, value) in headers {
            request.insert(*name, value.parse().unwrap());
        }
        let tag: ETag = "\"aa\"".parse().unwrap();
        // Half a second later than what a header can say.
        judge(&request, &tag, PUSHED + Duration::from_millis(1_500), 100)
    }

    const AT: &str = "Thu, 01 Jan 1970 00:00:01 GMT";
    const BEFORE: &str = "Thu, 01 Jan 1970 00:00:00 GMT";

    #[test]
    fn a_range_is_cut_to_the_file() {
        assert_eq!(verdict(&[]), Verdict::Whole);
        for (range, expected) in [
            ("bytes=0-", Verdict::Part(0..100)),
            ("bytes=10-19", Verdict::Part(10..20)),
            ("bytes=99-1000", Verdict::Part(99..100)),
            ("bytes=-30", Verdict::Part(70..100)),
            ("bytes=-1000", Verdict::Whole),
            ("bytes=100-", Verdict::NotSatisfiable),
            ("bytes=-0", Verdict::NotSatisfiable),
            ("bytes=5-4", Verdict::Whole),
            ("bytes=0-1,5-6", Verdict::Whole),
            ("bytes=0-18446744073709551615", Verdict::Part(0..100)),
            ("bytes=18446744073709551615-18446744073709551615", Verdict::NotSatisfiable),
            ("bytes=99999999999999999999-", Verdict::Whole),
            ("lines=1-2", Verdict::Whole),
            ("bytes=", Verdict::Whole),
        ] {
            assert_eq!(verdict(&[("range", range)]), expected, "{range}");
        }
    }

    #[test]
    fn a_range_of_other_bytes_is_answered_with_the_whole_file() {
        for (condition, part) in
            [("\"aa\"", true), ("W/\"aa\"", false), ("\"bb\"", false), (AT, true), (BEFORE, false), ("nonsense", true)]
        {
            let expected = if part { Verdict::Part(10..100) } else { Verdict::Whole };
            assert_eq!(verdict(&[("range", "bytes=10-"), ("if-range", condition)]), expected, "{condition}");
        }
    }

    #[test]
    fn conditions_hold_in_their_order() {
        for (headers, expected) in [
            ([("if-none-match", "\"aa\"")].as_slice(), Verdict::NotModified),
            (&[("if-none-match", "\"bb\""), ("if-modified-since", AT)], Verdict::Whole),
            (&[("if-modified-since", AT)], Verdict::NotModified),
            (&[("if-modified-since", BEFORE)], Verdict::Whole),
            (&[("if-match", "\"bb\"")], Verdict::PreconditionFailed),
            (&[("if-match", "\"aa\""), ("if-unmodified-since", BEFORE)], Verdict::Whole),
            (&[("if-unmodified-since", BEFORE)], Verdict::PreconditionFailed),
            (&[("if-unmodified-since", AT), ("range", "bytes=1-1")], Verdict::Part(1..2)),
        ] {
            assert_eq!(verdict(headers), expected, "{headers:?}");
        }
    }
}
