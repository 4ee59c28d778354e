package config

import (
	"reflect"
	"slices"

	"go.yaml.in/yaml/v3"
)

// field is one key of a record of type T.
type field[T any] struct {
	key  string
	read func(f *yamlFile, full string, n *yaml.Node, into *T)
}

// one is a field with a single value.
func one[T, V any](key string, parse func(string) (V, error), into func(*T, V)) field[T] {
	return field[T]{key, func(f *yamlFile, full string, n *yaml.Node, r *T) {
		if n.Kind != yaml.ScalarNode {
			f.errorf("%s: %s: want one value", f.at(n), full)
			return
		}
		v, err := parse(n.Value)
		if err != nil {
			f.errorf("%s: %s: %q: %w", f.at(n), full, n.Value, err)
			return
		}
		into(r, v)
	}}
}

// many is a field with a list of values. A single one may stand without a list.
func many[T, V any](key string, parse func(string) (V, error), into func(*T, []V)) field[T] {
	return field[T]{key, func(f *yamlFile, full string, n *yaml.Node, r *T) {
		values, ok := f.scalars(full, n)
		if ok && len(values) == 0 { // would match everything, which nobody means
			f.errorf("%s: %s: is empty: give a value or remove the key", f.at(n), full)
		}
		var out []V
		for _, s := range values {
			v, err := parse(s)
			if err != nil {
				f.errorf("%s: %s: %q: %w", f.at(n), full, s, err)
				continue
			}
			out = append(out, v)
		}
		into(r, out)
	}}
}

// section is a part of the file that lists records.
type section interface {
	name() string
	keys() []string // of a record, with the section's name before them
	load(*yamlFile, *yaml.Node)
	texts(*Config) []string
	same(a, b *Config) bool // they were written alike
	isLive() bool
}

// record describes a section of records of type T.
type record[T any] struct {
	key     string
	example string // of one record
	live    bool   // a running gateway can change it
	blank   T      // with the defaults
	plain   string // the key that a record without keys is the value of; "" = it needs keys
	max     int    // records, 0 = any number
	fields  []field[T]
	check   func(*T) error          // judges a record as a whole, and completes it
	list    func(*Config) *[]T      // where they are kept
	origin  func(T) string          // key of a record in [Config.Origin]; nil = records have none
	text    func(*Config, T) string // as shown
}

func (r *record[T]) name() string { return r.key }

func (r *record[T]) isLive() bool { return r.live }

func (r *record[T]) keys() []string {
	out := make([]string, len(r.fields))
	for i, fd := range r.fields {
		out[i] = r.key + "." + fd.key
	}
	return out
}

func (r *record[T]) texts(c *Config) []string {
	var out []string
	for _, v := range *r.list(c) {
		out = append(out, r.text(c, v))
	}
	return out
}

func (r *record[T]) same(a, b *Config) bool { return reflect.DeepEqual(*r.list(a), *r.list(b)) }

// load reads the section of the file.
func (r *record[T]) load(f *yamlFile, n *yaml.Node) {
	if isNull(n) {
		return
	}
	if n.Kind != yaml.SequenceNode {
		f.errorf("%s: %s: want a list, as in - %s", f.at(n), r.key, r.example)
		return
	}
	f.cfg.origin[r.key] = "file " + f.at(n)
	list := r.list(f.cfg)
	for _, item := range n.Content {
		if v, ok := r.one(f, resolve(item)); ok {
			*list = append(*list, v)
		}
	}
	if r.max > 0 && len(n.Content) > r.max {
		f.errorf("%s: %s: more than %d entries: leave some out", f.at(n), r.key, r.max)
	}
}

// one reads one record.
func (r *record[T]) one(f *yamlFile, item *yaml.Node) (v T, ok bool) {
	v = r.blank
	var given []string
	wrong := len(f.errs)
	read := func(key, full string, n *yaml.Node) {
		i := slices.IndexFunc(r.fields, func(fd field[T]) bool { return fd.key == key })
		if i < 0 {
			f.unknown(n, full, r.keys())
			return
		}
		given = append(given, key)
		r.fields[i].read(f, full, n, &v)
	}
	if item.Kind == yaml.ScalarNode && r.plain != "" {
		read(r.plain, r.key+"."+r.plain, item)
	} else {
		f.mapping(r.key+".", item, read)
	}
	if len(f.errs) > wrong { // what check would say now might be a consequence
		return v, false
	}
	if err := r.check(&v); err != nil {
		f.errorf("%s: %s: %w", f.at(item), r.key, err)
		return v, false
	}
	if r.origin != nil {
		for _, k := range given {
			f.cfg.origin[r.origin(v)+"."+k] = "file " + f.at(item)
		}
	}
	return v, true
}
