use super::*;

fn said(result: Result<impl std::fmt::Debug, LanError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn members_have_names_and_addresses() {
    let net = Lan::in_subnet([10, 9, 8], ["a", "db.example", "C-3"]).unwrap();
    assert_eq!(net.members().collect::<Vec<_>>(), ["a", "db.example", "C-3"]);
    assert_eq!(net.address("C-3").unwrap(), Ipv4Addr::new(10, 9, 8, 3));
    let [router] = &memberships(&[(net.clone(), "db.example".to_owned())]).unwrap()[..] else {
        panic!("one membership")
    };
    assert_eq!(router.device().mac.to_string(), "02:76:0a:09:08:02");
    assert_eq!(router.interface().address, [10, 9, 8, 2]);
    let hosts: Vec<_> = router.hosts().collect();
    assert_eq!(hosts[0], (Ipv4Addr::new(10, 9, 8, 1), "a".to_owned()));
    assert_eq!(hosts.len(), 3);
    let (one, two) = (Lan::of(["a"]).unwrap(), Lan::of(["a"]).unwrap());
    assert_ne!(one.address("a").unwrap(), two.address("a").unwrap());
    assert_eq!(one.address("a").unwrap().octets()[..2], SUBNETS);
    let all = Lan::of((0..MAX_MEMBERS).map(|n| format!("n{n}"))).unwrap();
    assert_eq!(all.address("n253").unwrap().octets()[3], 254);
}

#[test]
fn networks_that_cannot_be_say_why() {
    let many = (0..=MAX_MEMBERS).map(|n| format!("n{n}"));
    assert_eq!(said(Lan::of(many)), "a network has 1 to 254 members, not 255");
    assert_eq!(said(Lan::of([""; 0])), "a network has 1 to 254 members, not 0");
    for name in ["", "a b", "-a", "a-", "a..b", ".", "a_b", "ä", "a\nb", &"a".repeat(64)] {
        assert!(said(Lan::of([name])).contains("letters, digits and `-`"), "{name}");
    }
    let long = [["a"; 33].join("."), "aa".to_owned()].concat();
    assert!(said(Lan::of([long])).contains("more than 64 bytes"));
    assert!(said(Lan::of(["10.1"])).contains("taken for an address"));
    assert!(said(Lan::of(["Localhost"])).contains("every guest itself"));
    assert_eq!(said(Lan::of(["a", "b", "A"])), "two members of a network have the name `A`");
    for first in [0, 127, 224, 255] {
        assert!(said(Lan::in_subnet([first, 1, 2], ["a"])).contains(".1.2.0/24"));
    }
    let net = Lan::in_subnet([10, 9, 7], ["a", "b"]).unwrap();
    let unknown = "the network has no member `c`; it has a, b";
    assert_eq!(said(net.cut("c")), unknown);
    assert_eq!(said(net.address("c")), unknown);
    assert_eq!(said(memberships(&[(net.clone(), "c".to_owned())])), unknown);
    let twice = [(net.clone(), "a".to_owned()), (net.clone(), "b".to_owned())];
    assert!(said(memberships(&twice)).starts_with("a VM cannot be `a` and `b`: both are at 10.9."));
    let many = vec![(net, "a".to_owned()); MAX_LANS + 1];
    assert_eq!(said(memberships(&many)), "a VM can be on 16 networks, not on 17");
}

#[test]
fn a_place_is_one_vms_at_a_time() {
    let net = Lan::of(["a", "b"]).unwrap();
    let members = memberships(&[(net.clone(), "a".to_owned())]).unwrap();
    let claim = members[0].claim().unwrap();
    assert!(said(members[0].claim()).starts_with("a VM that runs is `a` already"));
    // The port has it, also when its VM is started a second time.
    let first = claim.port().unwrap();
    drop(first);
    let port = claim.port().unwrap();
    drop(claim);
    assert!(members[0].claim().is_err());
    assert_eq!(net.counters("a").unwrap(), Some(Counters::default()));
    drop(port);
    assert_eq!(net.counters("a").unwrap(), None);
    drop(members[0].claim().unwrap());
}

#[test]
fn a_member_is_cut_off_whether_it_runs_or_not() {
    use rustix::net::{RecvFlags, SendFlags, recv, send};
    let net = Lan::of(["a", "b"]).unwrap();
    let port = |name: &str| {
        let members = memberships(&[(net.clone(), name.to_owned())]).unwrap();
        members[0].claim().unwrap().port().unwrap()
    };
    let frame = |from: u8| [&[0xff; 6][..], &[0x02, 0, 0, 0, 0, from], &[0; 2]].concat();
    let arrives = |from: &LanPort, to: &LanPort, number: u8| {
        send(from.device(), &frame(number), SendFlags::empty()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        recv(to.device(), &mut [0; 14][..], RecvFlags::DONTWAIT).is_ok()
    };
    net.cut("a").unwrap();
    let (a, b) = (port("a"), port("b"));
    assert!(!arrives(&a, &b, 1) && !arrives(&b, &a, 2));
    net.join("a").unwrap();
    assert!(arrives(&a, &b, 1) && arrives(&b, &a, 2));
    net.cut("b").unwrap();
    assert!(!arrives(&a, &b, 1) && !arrives(&b, &a, 2));
}

#[test]
fn a_network_is_split_and_healed() {
    let net = Lan::of(["a", "b", "c", "d"]).unwrap();
    let sides = || -> Vec<_> { lock(&net.shared.members).iter().map(Member::side).collect() };
    net.split([vec!["a", "c"], vec!["b"]]).unwrap();
    assert_eq!(sides(), [Some(1), Some(2), Some(1), Some(0)]);
    assert_eq!(
        said(net.split([["a", "b"], ["d", "a"]])),
        "`a` cannot be on two sides of a network that is split"
    );
    assert!(said(net.split([["e"]])).contains("no member `e`"));
    net.cut("a").unwrap();
    net.split([["d"]]).unwrap();
    assert_eq!(sides(), [None, Some(0), Some(0), Some(1)]);
    net.heal();
    assert_eq!(sides(), [Some(0); 4]);
}
