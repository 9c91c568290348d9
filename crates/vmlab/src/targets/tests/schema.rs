//! The JSON schema, made from the types of the tables.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

use crate::config::{MAX_SERIAL, Topology};
use crate::disk::CloneMode;
use crate::events::{EventKind, GROUPS};
use crate::targets::file;
use crate::targets::spelling::{kebab, snake};
use crate::targets::table::{
    DiskTable, Disks, Field, MountTable, Mounts, ShareTable, Shares, TargetTable,
};
use crate::targets::value::{CommandText, Cpus, Env, Kinds, Named, Strings, Time, Word};
use crate::units::Bytes;

/// The names of all kernel events.
fn kinds() -> Vec<&'static str> {
    EventKind::ALL.map(EventKind::name).to_vec()
}

/// Says what a type looks like, in place.
macro_rules! looks_like {
    ($($type:ty: $schema:expr;)*) => {$(
        impl JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(generator: &mut SchemaGenerator) -> Schema {
                let schema: fn(&mut SchemaGenerator) -> Schema = $schema;
                schema(generator)
            }
        }
    )*};
}

looks_like! {
    Cpus: |_| json_schema!({ "type": "integer", "minimum": 1, "maximum": crate::config::MAX_CPUS });
    Bytes: |_| json_schema!({ "type": ["string", "integer"] });
    Time: |_| json_schema!({ "type": ["string", "integer"] });
    Topology: |_| json_schema!({ "type": "string" });
    Strings: |_| json_schema!({ "anyOf": [{ "type": "string" }, string_array()] });
    CommandText: |_| json_schema!({ "anyOf": [{ "type": "string" }, string_array()] });
    Env: |_| json_schema!({
        "type": "object",
        "additionalProperties": { "type": ["string", "integer", "boolean"] },
    });
    EventKind: |_| json_schema!({ "enum": kinds() });
    Kinds: |_| {
        let names = [kinds(), GROUPS.to_vec()].concat();
        let name = json!({ "enum": names });
        json_schema!({ "anyOf": [name, { "type": "array", "items": name }] })
    };
    Shares: |generator| {
        let share = generator.subschema_for::<ShareTable>();
        let items = json!({ "anyOf": [{ "type": "string" }, share] });
        json_schema!({ "type": "array", "items": items })
    };
    Disks: |generator| {
        let disk = generator.subschema_for::<DiskTable>();
        let item = json!({ "anyOf": [{ "type": "string" }, disk] });
        json_schema!({ "anyOf": [{ "type": "string" }, disk, { "type": "array", "items": item }] })
    };
    CloneMode: |_| json_schema!({ "enum": ["auto", "reflink", "copy", "overlay"] });
    Mounts: |generator| {
        let mount = generator.subschema_for::<MountTable>();
        json_schema!({ "type": "object", "additionalProperties": mount })
    };
}

impl<T: JsonSchema> JsonSchema for Field<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

impl<T: Named> JsonSchema for Word<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Word".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let names: Vec<&str> = T::NAMES.iter().map(|(name, _)| *name).collect();
        json_schema!({ "enum": names })
    }
}

fn string_array() -> Value {
    json!({ "type": "array", "items": { "type": "string" } })
}

/// What all keys of a table can be, by their names with `-`.
fn properties(table: &Value) -> Map<String, Value> {
    let properties = table["properties"].as_object().unwrap().clone();
    let optional = |mut schema: Value| {
        // Each key may be left out, and none can be null, which TOML does not have.
        if let Some(types) = schema["type"].as_array_mut() {
            types.retain(|name| name != "null");
            if let [only] = &types[..] {
                schema["type"] = only.clone();
            }
        }
        if let Some(of) = schema["anyOf"].as_array_mut() {
            of.retain(|part| part["type"] != "null");
            if let [only] = &of.clone()[..] {
                let schema = schema.as_object_mut().unwrap();
                schema.remove("anyOf");
                schema.extend(only.as_object().unwrap().clone());
            }
        }
        if let Some(of) = schema["enum"].as_array_mut() {
            of.retain(|value| !value.is_null());
        }
        schema.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        schema
    };
    properties.into_iter().map(|(key, schema)| (key, optional(schema))).collect()
}

/// A table of these keys. Each may be written with `_`, too.
fn table(about: &str, keys: &Map<String, Value>, required: &[&str]) -> Value {
    let mut all = keys.clone();
    for (key, schema) in keys {
        all.insert(snake(key), schema.clone());
    }
    let mut table = json!({
        "description": about, "type": "object", "additionalProperties": false, "properties": all,
    });
    if !required.is_empty() {
        table["required"] = json!(required);
    }
    table
}

fn schema() -> Value {
    let mut generator = SchemaGenerator::default();
    let target = generator.root_schema_for::<TargetTable>().to_value();
    let mut definitions = Map::new();
    for (name, definition) in target["$defs"].as_object().unwrap() {
        let about = definition["description"].as_str().unwrap();
        definitions.insert(name.clone(), table(about, &properties(definition), &[]));
    }
    let mut target = properties(&target);
    // What tables in an array are rather called.
    target.insert("disk".to_owned(), target["disks"].clone());

    let mut defaults = target.clone();
    defaults.remove("name");

    let scalar = json!({ "type": ["string", "integer", "boolean"] });
    let scalars = json!({ "anyOf": [scalar, { "type": "array", "items": scalar }] });
    let mut matrix = target.clone();
    for (key, schema) in &mut matrix {
        if key != "name" && TargetTable::is_scalar(&snake(key)) {
            let about = schema.as_object_mut().unwrap().remove("description");
            let one = schema.clone();
            *schema = json!({ "anyOf": [one, { "type": "array", "items": one, "minItems": 1 }] });
            schema["description"] = about.unwrap();
        }
    }
    for (key, about, schema) in [
        (
            "vars",
            "Variables: a value or an array of values each.",
            json!({ "type": "object", "additionalProperties": scalars }),
        ),
        (
            "include",
            "Further combinations: values of axes, and keys of a target that only these have.",
            json!({ "type": "array", "items": { "type": "object" } }),
        ),
        (
            "exclude",
            "Combinations to leave out: values of axes.",
            json!({ "type": "array", "items": { "type": "object", "additionalProperties": scalars } }),
        ),
    ] {
        let mut schema = schema;
        schema["description"] = json!(about);
        matrix.insert(key.to_owned(), schema);
    }

    let named = |name: &str| json!({ "$ref": format!("#/$defs/{name}") });
    definitions.insert(
        "TargetTable".to_owned(),
        table("A named run: a command in a fresh VM.", &target, &["name"]),
    );
    definitions.insert(
        "MatrixTable".to_owned(),
        table("Many targets: each key with an array is an axis.", &matrix, &["name"]),
    );
    definitions.insert(
        "DefaultsTable".to_owned(),
        table("What targets have that do not say otherwise.", &defaults, &[]),
    );
    let disks = json!({
        "type": "object",
        "additionalProperties": named("DiskTable"),
        "propertyNames": { "pattern": format!("^[A-Za-z0-9_-]{{1,{MAX_SERIAL}}}$") },
    });
    let top = [
        ("defaults", named("DefaultsTable")),
        ("shares", json!({ "type": "object", "additionalProperties": named("ShareTable") })),
        ("disks", disks),
        ("target", json!({ "type": "array", "items": named("TargetTable") })),
        ("matrix", json!({ "type": "array", "items": named("MatrixTable") })),
    ];
    assert_eq!(top.each_ref().map(|(key, _)| *key), file::KEYS);
    let top: Map<String, Value> =
        top.into_iter().map(|(key, schema)| (key.to_owned(), schema)).collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vmlab.toml",
        "type": "object",
        "additionalProperties": false,
        "properties": top,
        "$defs": definitions,
    })
}

#[test]
fn the_committed_schema_is_that_of_the_types() {
    let made = format!("{}\n", serde_json::to_string_pretty(&schema()).unwrap());
    if std::env::var_os("VMLAB_WRITE_SCHEMA").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/vmlab.schema.json");
        std::fs::write(path, &made).unwrap();
    }
    assert!(
        made == crate::targets::SCHEMA,
        "the keys have changed: run this test with VMLAB_WRITE_SCHEMA=1, and commit what it writes"
    );
}

#[test]
fn the_schema_has_each_key_in_both_ways_of_writing() {
    let schema = schema();
    for name in ["TargetTable", "MatrixTable"] {
        let properties = schema["$defs"][name]["properties"].as_object().unwrap();
        for key in TargetTable::KEYS {
            assert!(properties.contains_key(*key), "{name}: {key}");
            let about = &properties[&kebab(key)]["description"];
            assert!(about.as_str().is_some_and(|about| !about.is_empty()), "{name}: {key}");
        }
    }
    // A schema that lets everything through would pass all else.
    assert_eq!(schema["$defs"]["TargetTable"]["additionalProperties"], false);
    assert_eq!(schema["$defs"]["VmTable"]["properties"]["num_cpus"]["type"], "integer");
}
