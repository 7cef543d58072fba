//! The order in which connections give way.

use std::sync::Arc;

use super::{Limits, OF_A_NODE, Place, Places, STRANGER_STREAMS, STRANGERS, mirror_places};
use crate::identity::roles::Role;

const LIMITS: Limits = Limits { handshakes: 10, strangers: 6, strangers_of_one: 4, nodes: 20, people: 2 };

fn enter(places: &Arc<Places>, address: &str) -> Place {
    let place = places.arrive(address.parse().unwrap());
    place.enter();
    place
}

fn ended(places: &[Place]) -> Vec<bool> {
    places.iter().map(|place| place.end.is_cancelled()).collect()
}

#[test]
fn oldest_stranger_gives_way_to_a_newcomer() {
    let places = Places::new(LIMITS);
    let mut here: Vec<Place> = (0..5).map(|_| enter(&places, "10.0.0.1")).collect();
    assert_eq!(ended(&here), [true, false, false, false, false], "more than one address may have");
    here.push(enter(&places, "10.0.0.2"));
    here.push(enter(&places, "10.0.0.3"));
    assert_eq!(ended(&here), [true, false, false, false, false, false, false]);
    here.push(enter(&places, "10.0.0.4"));
    assert_eq!(ended(&here), [true, true, false, false, false, false, false, false], "more than all may have");
    drop(here);
    let taken = places.taken();
    assert!(taken.strangers.is_empty() && taken.addresses.is_empty(), "{taken:?}");
}

#[test]
fn accepted_connection_gives_way_to_no_stranger() {
    let places = Places::new(LIMITS);
    let admin = enter(&places, "10.0.0.1");
    admin.accept(Role::Admin, "admin");
    let strangers: Vec<Place> = (0..100).map(|_| enter(&places, "10.0.0.1")).collect();
    assert!(admin.is_accepted() && !admin.end.is_cancelled());
    assert_eq!(ended(&strangers).iter().filter(|ended| !**ended).count(), LIMITS.strangers_of_one);
}

#[test]
fn crowd_of_strangers_pushes_out_nobody_who_is_being_looked_up() {
    let places = Places::new(LIMITS);
    let (admin, late) = (places.arrive("10.0.0.1".parse().unwrap()), places.arrive("10.0.0.1".parse().unwrap()));
    let strangers: Vec<Place> = (0..100).map(|_| enter(&places, "10.0.0.1")).collect();
    admin.accept(Role::Admin, "admin");
    for place in [&admin, &late] {
        place.enter();
        assert!(!place.end.is_cancelled());
    }
    // A certificate that was not found in time leaves a stranger like any other.
    let more: Vec<Place> = (0..100).map(|_| enter(&places, "10.0.0.1")).collect();
    assert!(!admin.end.is_cancelled() && late.end.is_cancelled());
    drop((strangers, more, late, places.arrive("10.0.0.1".parse().unwrap())));
    let taken = places.taken();
    assert!(taken.arriving.is_empty() && taken.strangers.is_empty(), "{taken:?}");
}

#[test]
fn one_node_has_so_many_and_keeps_nobody_else_out() {
    let places = Places::new(LIMITS);
    let node = |name: &str| {
        let place = enter(&places, "10.0.0.1");
        place.accept(Role::Node, name);
        place
    };
    let greedy: Vec<Place> = (0..3 * OF_A_NODE).map(|_| node("greedy")).collect();
    let honest = node("honest");
    assert_eq!(ended(&greedy).iter().filter(|ended| !**ended).count(), OF_A_NODE);
    assert!(ended(&greedy).iter().rev().take(OF_A_NODE).all(|ended| !ended), "the newest stay");
    assert!(!honest.end.is_cancelled());
    drop((greedy, honest));
    assert_eq!(places.taken().nodes, 0);
}

#[test]
fn nodes_leave_room_for_people() {
    let places = Places::new(LIMITS);
    let taken: Vec<Place> = (0..30)
        .map(|number| {
            let place = enter(&places, "10.0.0.1");
            place.accept(Role::Node, &format!("pi-{number}"));
            place
        })
        .collect();
    assert_eq!(ended(&taken).iter().filter(|ended| !**ended).count(), LIMITS.nodes);
    let admin = enter(&places, "10.0.0.1");
    admin.accept(Role::Admin, "admin");
    assert!(!admin.end.is_cancelled());
}

#[test]
fn greedy_person_shuts_no_other_person_out() {
    let places = Places::new(Limits { people: 6, ..LIMITS });
    let connect = |name: &str| {
        let place = enter(&places, "10.0.0.1");
        place.accept(Role::Viewer, name);
        place
    };
    let greedy: Vec<Place> = (0..6).map(|_| connect("greedy")).collect();
    let admin: Vec<Place> = (0..4).map(|_| connect("admin")).collect();
    assert_eq!(ended(&greedy), [true, true, true, false, false, false], "its oldest give way");
    // Three for each: neither takes another one from the other, in turn and without end.
    assert_eq!(ended(&admin), [false, false, false, true]);
    assert!(connect("greedy").end.is_cancelled());
    assert!(!connect("third").end.is_cancelled(), "who has none takes one of three");
    assert_eq!(places.taken().people, 5, "and is gone again");
    drop((greedy, admin));
    assert_eq!(places.taken().people, 0);
}

#[test]
fn where_everybody_has_one_connection_the_newcomer_waits() {
    let places = Places::new(LIMITS);
    let (one, two) = (enter(&places, "10.0.0.1"), enter(&places, "10.0.0.1"));
    one.accept(Role::Admin, "one");
    two.accept(Role::Admin, "two");
    let three = enter(&places, "10.0.0.1");
    three.accept(Role::Admin, "three");
    assert_eq!(ended(&[one, two, three]), [false, false, true]);
}

#[test]
fn node_with_several_connections_makes_room_for_another_node() {
    let places = Places::new(Limits { nodes: OF_A_NODE, ..LIMITS });
    let connect = |name: &str| {
        let place = enter(&places, "10.0.0.1");
        place.accept(Role::Node, name);
        place
    };
    let greedy: Vec<Place> = (0..OF_A_NODE).map(|_| connect("greedy")).collect();
    let honest = connect("honest");
    assert!(!honest.end.is_cancelled() && greedy[0].end.is_cancelled() && !greedy[1].end.is_cancelled());
}

#[test]
fn a_stranger_has_four_calls() {
    let place = Place::detached();
    assert!((0..STRANGER_STREAMS).all(|_| place.begin_call()) && !place.begin_call());
    place.end_call();
    assert!(place.begin_call());
}

#[test]
fn three_listeners_leave_files_for_the_store() {
    for files in [1024, 4096, 65_536, 1 << 20] {
        let limits = Limits::of_files(files);
        let mirror = Limits::of_mirror(files);
        let strangers = 3 * (limits.handshakes + limits.strangers);
        // Each connection that the mirror serves has a file open too.
        let most = strangers + limits.nodes + limits.people + mirror.nodes + mirror.people + mirror_places(files);
        assert!(most <= files / 10 * 9, "{most} of {files}");
        assert!(limits.strangers <= STRANGERS);
    }
}
