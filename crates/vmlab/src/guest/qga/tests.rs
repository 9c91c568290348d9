use std::io::{BufRead, BufReader, Write};
use std::sync::mpsc;
use std::thread;

use super::*;

/// Long enough for a busy machine; no test that passes waits for it.
const AGES: Duration = Duration::from_secs(60);

/// A guest agent made up for a test.
struct Fake {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Fake {
    fn read(&mut self) -> Option<Value> {
        let mut line = Vec::new();
        if self.reader.read_until(b'\n', &mut line).ok()? == 0 {
            return None;
        }
        let json = line.strip_prefix(&[0xff]).unwrap_or(&line);
        Some(serde_json::from_slice(json).unwrap())
    }

    /// The next command, with its arguments.
    fn expect(&mut self, command: &str) -> Value {
        let mut value = self.read().expect("a command");
        assert_eq!(value["execute"], command);
        value["arguments"].take()
    }

    fn say(&mut self, text: &[u8]) {
        self.writer.write_all(text).unwrap();
    }

    fn answer(&mut self, value: &Value) {
        self.say(format!("{}\n", json!({ "return": value })).as_bytes());
    }

    fn refuse(&mut self, class: &str, desc: &str) {
        self.say(format!("{}\n", json!({"error": {"class": class, "desc": desc}})).as_bytes());
    }

    fn synchronise(&mut self) {
        let call = self.read().unwrap();
        assert_eq!(call["execute"], "guest-sync-delimited");
        self.answer_call(&call);
    }

    /// Answers, and is of a system whose systemd has not been given the agent.
    fn begin(&mut self) {
        self.synchronise();
        self.has_no_unit();
    }

    fn has_no_unit(&mut self) {
        assert_eq!(self.expect("guest-file-open")["path"], UNIT_FILE);
        self.refuse("GenericError", "failed to open file: No such file or directory");
    }

    fn answer_call(&mut self, call: &Value) {
        let id = &call["arguments"]["id"];
        self.say(&[b"\xff", json!({"return": id}).to_string().as_bytes(), b"\n"].concat());
    }

    /// Takes the script's start, and says that it ended like this. Returns the arguments.
    fn run_script(&mut self, status: &Value) -> Value {
        let arguments = self.expect("guest-exec");
        self.answer(&json!({"pid": 77}));
        assert_eq!(self.expect("guest-exec-status")["pid"], 77);
        self.answer(&json!({"exited": false}));
        assert_eq!(self.expect("guest-exec-status")["pid"], 77);
        self.answer(status);
        arguments
    }
}

/// What `put_agent` makes of a guest agent.
fn put_within(
    time: Duration,
    fake: impl FnOnce(&mut Fake) + Send + 'static,
) -> Result<(), QgaError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (done, over) = mpsc::channel::<()>();
    let fake = thread::spawn(move || {
        let reader = BufReader::new(theirs.try_clone().unwrap());
        let mut end = Fake { reader, writer: theirs };
        fake(&mut end);
        // The socket is closed when the test is over, unless the fake did so.
        over.recv().ok();
    });
    let result = put_agent(&ours, b"agent", Instant::now() + time, &|| false);
    drop(done);
    fake.join().unwrap();
    result
}

fn put(fake: impl FnOnce(&mut Fake) + Send + 'static) -> Result<(), QgaError> {
    put_within(AGES, fake)
}

#[test]
fn the_script_starts_the_agent_of_the_drive() {
    put(|fake| {
        fake.begin();
        let arguments = fake.run_script(&json!({"exited": true, "exitcode": 0}));
        assert_eq!(arguments["path"], "/bin/sh");
        assert_eq!(arguments["arg"], json!(["-c", START_AGENT, "start", "detached"]));
        assert_eq!(arguments["capture-output"], true);
        assert_eq!(arguments["input-data"], Value::Null);
    })
    .unwrap();
}

#[test]
fn without_a_drive_the_agent_goes_through_the_port() {
    put(|fake| {
        fake.begin();
        fake.run_script(&json!({"exited": true, "exitcode": 4, "err-data": "bm8="}));
        let arguments = fake.run_script(&json!({"exited": true, "exitcode": 0}));
        assert_eq!(arguments["arg"][3], "stdin");
        let input = base64::decode(arguments["input-data"].as_str().unwrap());
        assert_eq!(input.as_deref(), Some(&b"agent"[..]));
    })
    .unwrap();
}

#[test]
fn stale_answers_and_noise_are_skipped() {
    put(|fake| {
        let first = fake.read().unwrap();
        fake.say(b"{\"return\": {}}\n");
        fake.say(b"\xff{\"return\": 1}\nnonsense\n\xff\xff\n{\"error\": {\"class\": \"x\", ");
        fake.say(b"\"desc\": \"Invalid JSON\"}}\n");
        // Without the delimiter it is the answer to something else.
        let id = first["arguments"]["id"].clone();
        fake.answer(&id);
        // Late: another call is made in the meantime, and both are answered.
        let second = fake.read().unwrap();
        assert!(second["arguments"]["id"].as_u64() > id.as_u64());
        fake.answer_call(&first);
        // After the delimiter, and in pieces.
        fake.say(b"{\"ret\xff");
        let text = json!({"return": second["arguments"]["id"]}).to_string();
        for byte in text.bytes().chain([b'\r', b'\n']) {
            fake.say(&[byte]);
        }
        fake.has_no_unit();
        fake.run_script(&json!({"exited": true, "exitcode": 0}));
    })
    .unwrap();
}

#[test]
fn a_disabled_command_is_told_by_name() {
    let answers = [
        ("CommandNotFound", "Command guest-exec has been disabled: the command is not allowed"),
        ("GenericError", "The command guest-exec has been disabled for this instance"),
        ("CommandNotFound", "The command guest-exec has not been found"),
    ];
    for (class, desc) in answers {
        let error = put(move |fake| {
            fake.begin();
            fake.expect("guest-exec");
            fake.refuse(class, desc);
        });
        assert!(
            matches!(&error, Err(QgaError::Disabled { command: "guest-exec", said }) if said == desc)
        );
        let text = error.unwrap_err().to_string();
        assert!(text.contains("guest-exec is disabled") && text.contains(desc), "{text}");
    }
    let error = put(|fake| {
        fake.begin();
        fake.expect("guest-exec");
        fake.refuse("GenericError", "Failed to execute child process");
    });
    assert!(matches!(error, Err(QgaError::Refused { .. })), "{error:?}");
}

#[test]
fn a_script_that_fails_shows_its_words() {
    let cases = [
        (
            json!({"exited": true, "exitcode": 3, "err-data": "dm1sYWI6IG5vIHBvcnQK"}),
            "(exit code 3): vmlab: no port",
        ),
        (json!({"exited": true, "signal": 9}), "(signal 9): it said nothing"),
        (json!({"exited": true, "exitcode": 5, "err-data": "!"}), "(exit code 5): it said nothing"),
    ];
    for (status, words) in cases {
        let error = put(move |fake| {
            fake.begin();
            fake.run_script(&status);
        });
        let text = error.unwrap_err().to_string();
        assert!(text.ends_with(words), "{text}");
    }
    // Also in the second try, whatever its exit code means in the first.
    let error = put(|fake| {
        fake.begin();
        for _ in 0..2 {
            fake.run_script(&json!({"exited": true, "exitcode": 4}));
        }
    });
    assert!(matches!(error, Err(QgaError::Start { .. })), "{error:?}");
}

#[test]
fn answers_without_end_are_not_kept() {
    let flood = |fake: &mut Fake| {
        let mut sent = 0;
        let piece = vec![b'x'; 64 << 10];
        while sent < 3 << 20 && fake.writer.write_all(&piece).is_ok() {
            sent += piece.len();
        }
        fake.writer.write_all(b"\n").ok();
    };
    let error = put(move |fake| {
        fake.begin();
        fake.expect("guest-exec");
        flood(fake);
    });
    let text = error.unwrap_err().to_string();
    assert!(text.contains("more than 1048576 bytes"), "{text}");
    // Before the guest agent has answered they are noise.
    put(move |fake| {
        flood(fake);
        fake.begin();
        fake.run_script(&json!({"exited": true, "exitcode": 0}));
    })
    .unwrap();
}

#[test]
fn answers_that_make_no_sense_are_errors() {
    for answer in [&b"{\"return\": {}}\n"[..], b"[]\n", b"\n", b"{\"return\": {\"pid\": \"x\"}}\n"]
    {
        let error = put(move |fake| {
            fake.begin();
            fake.expect("guest-exec");
            fake.say(answer);
        });
        assert!(matches!(error, Err(QgaError::Nonsense { .. })), "{error:?}");
    }
}

#[test]
fn who_does_not_answer_is_called_until_the_deadline() {
    let (calls, called) = mpsc::channel();
    let error = put_within(Duration::from_millis(2500), move |fake| {
        for _ in 0..2 {
            calls.send(fake.read().unwrap()["arguments"]["id"].as_u64()).unwrap();
        }
    });
    let ids: Vec<_> = called.iter().collect();
    assert!(ids[0] < ids[1], "{ids:?}");
    let text = error.unwrap_err().to_string();
    assert!(text.starts_with("qemu-guest-agent did not answer within "), "{text}");
    let error = put_within(Duration::from_millis(300), |fake| {
        fake.begin();
        fake.expect("guest-exec");
    });
    let text = error.unwrap_err().to_string();
    assert!(text.starts_with("qemu-guest-agent did not answer `guest-exec` within"), "{text}");
}

#[test]
fn nobody_waits_for_a_vm_that_has_ended_or_a_run_that_is_cancelled() {
    let error = put(|fake| {
        fake.synchronise();
        fake.writer.shutdown(std::net::Shutdown::Both).unwrap();
    });
    assert!(matches!(error, Err(QgaError::Closed)), "{error:?}");
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let started = Instant::now();
    let cancelled = || started.elapsed() > Duration::from_millis(200);
    let error = put_agent(&ours, b"agent", started + AGES, &cancelled);
    assert!(matches!(error, Err(QgaError::Cancelled)), "{error:?}");
}

#[test]
fn an_agent_that_comes_by_itself_is_waited_for_but_not_for_long() {
    let comes = |fake: &mut Fake| {
        fake.synchronise();
        fake.expect("guest-file-open");
        fake.answer(&json!(1000));
        assert_eq!(fake.expect("guest-file-close")["handle"], 1000);
        fake.answer(&json!({}));
    };
    let asked = Instant::now();
    put(move |fake| {
        comes(fake);
        fake.run_script(&json!({"exited": true, "exitcode": 0}));
        assert!(asked.elapsed() > COMING_TIME);
    })
    .unwrap();
    // Nothing is run once it is there.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let fake = thread::spawn(move || {
        let reader = BufReader::new(theirs.try_clone().unwrap());
        let mut end = Fake { reader, writer: theirs };
        comes(&mut end);
        assert!(end.read().is_none());
    });
    let cancelled = || asked.elapsed() > COMING_TIME + Duration::from_secs(1);
    let error = put_agent(&ours, b"agent", asked + AGES, &cancelled);
    assert!(matches!(error, Err(QgaError::Cancelled)), "{error:?}");
    drop(ours);
    fake.join().unwrap();
}
