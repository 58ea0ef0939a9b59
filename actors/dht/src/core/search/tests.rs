use libp2p_identity::PeerId;

use super::*;

/// The node at this distance from the key of zeros.
fn node(distance: u8) -> Contact {
    let mut id = [0; 20];
    id[0] = distance;
    let peer = PeerId::from_bytes(&[&[0x12, 0x20], &[distance; 32][..]].concat()).unwrap();
    Contact { id: DhtId(id), peer }
}

const KEY: DhtId = DhtId([0; 20]);

fn breadth() -> Breadth {
    Breadth { beam_size: 3, num_workers: 2, queries_per_call: 1, max_visits: 9, enough: 2 }
}

fn search(breadth: Breadth, known: std::ops::RangeInclusive<u8>) -> Search {
    Search::new(breadth, DhtId([255; 20]), [(KEY, known.map(node).collect())])
}

/// Whom it asks next.
fn next(search: &mut Search) -> Option<u8> {
    search.next_call().map(|(contact, _)| contact.id.0[0])
}

fn answer(search: &mut Search, from: u8, standing: Standing, neighbours: &[u8]) {
    search.on_answer(node(from), standing, vec![(KEY, neighbours.iter().copied().map(node).collect())]);
}

#[test]
fn a_slow_call_gives_its_place_to_the_next_and_is_waited_for_all_the_same() {
    let mut search = search(breadth(), 1..=4);
    assert_eq!([next(&mut search), next(&mut search), next(&mut search)], [Some(1), Some(2), None]);
    search.on_slow(node(1));
    assert_eq!([next(&mut search), next(&mut search)], [Some(3), None]);
    answer(&mut search, 2, Standing::Prompt, &[1]);
    assert_eq!(next(&mut search), Some(4), "a slow one keeps nobody out of the beam, and is not asked twice");
    answer(&mut search, 3, Standing::Prompt, &[]);
    answer(&mut search, 4, Standing::Prompt, &[]);
    assert!(!search.is_done(), "the slow one may know better");
    answer(&mut search, 1, Standing::Slow, &[0]);
    assert_eq!(next(&mut search), Some(0));
    answer(&mut search, 0, Standing::Prompt, &[]);
    assert!(search.is_done());
    assert_eq!(search.nearest(&KEY), [node(0), node(1), node(2)]);
}

#[test]
fn a_slow_call_that_fails_in_the_end_ends_the_search() {
    let mut search = search(breadth(), 1..=2);
    next(&mut search);
    next(&mut search);
    search.on_slow(node(1));
    answer(&mut search, 2, Standing::Prompt, &[]);
    assert!(!search.is_done());
    search.on_failure(node(1), Standing::Slow, &[KEY]);
    assert!(search.is_done());
    assert_eq!(search.nearest(&KEY), [node(2)]);
}

#[test]
fn nobody_waits_for_those_asked_aside_once_enough_others_answered() {
    let mut search = search(breadth(), 1..=3);
    next(&mut search);
    search.set_aside(node(1), &[KEY]);
    assert_eq!([next(&mut search), next(&mut search), next(&mut search)], [Some(2), Some(3), None]);
    answer(&mut search, 2, Standing::Prompt, &[1]);
    assert!(!search.is_done());
    answer(&mut search, 3, Standing::Prompt, &[]);
    assert!(search.is_done());
    assert_eq!(search.nearest(&KEY), [node(2), node(3)], "who was not heard is no place to store at");
    answer(&mut search, 1, Standing::Aside, &[]);
    assert_eq!(search.answered(&KEY).next(), Some(node(1)));
}

#[test]
fn who_knows_only_doubtful_nodes_waits_for_them() {
    let mut search = search(breadth(), 1..=2);
    for n in 1..=2 {
        assert_eq!(next(&mut search), Some(n));
        search.set_aside(node(n), &[KEY]);
    }
    assert!(!search.is_done());
    answer(&mut search, 1, Standing::Aside, &[5]);
    assert_eq!(next(&mut search), Some(5));
    search.on_failure(node(5), Standing::Prompt, &[KEY]);
    assert!(!search.is_done(), "one answer is not enough");
    search.on_failure(node(2), Standing::Aside, &[KEY]);
    assert!(search.is_done());
}

#[test]
fn nodes_that_are_skipped_or_asked_aside_use_up_no_visits() {
    let mut search = search(Breadth { max_visits: 2, enough: 1, ..breadth() }, 1..=9);
    for n in 1..=3 {
        assert_eq!(next(&mut search), Some(n));
        search.skip(node(n), &[KEY]);
    }
    for n in 4..=6 {
        assert_eq!(next(&mut search), Some(n));
        search.set_aside(node(n), &[KEY]);
    }
    assert_eq!([next(&mut search), next(&mut search)], [Some(7), Some(8)]);
    answer(&mut search, 7, Standing::Prompt, &[]);
    search.on_failure(node(8), Standing::Prompt, &[KEY]);
    assert_eq!(next(&mut search), None);
    assert!(search.is_done());
}

#[test]
fn a_late_answer_makes_a_node_worth_asking_for_the_other_keys_again() {
    let other = DhtId([1; 20]);
    let known = || vec![node(1), node(2)];
    let mut search = Search::new(breadth(), DhtId([255; 20]), [(KEY, known()), (other, known())]);
    let (slow, keys) = search.next_call().unwrap();
    search.on_slow(slow);
    let (second, third) = (search.next_call().unwrap(), search.next_call().unwrap());
    assert_eq!((second.0, third.0), (node(2), node(2)), "no other key waits behind a silent node");
    let of_slow = if second.1 == keys { &second } else { &third };
    search.on_answer(of_slow.0, Standing::Prompt, vec![(of_slow.1[0], known())]);
    assert!(search.next_call().is_none());
    search.on_answer(slow, Standing::Slow, vec![(keys[0], vec![])]);
    let (again, for_other) = search.next_call().unwrap();
    assert_eq!(again, slow);
    assert_ne!(for_other, keys);
}
