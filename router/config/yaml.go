package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v3"
)

// reserved keys have a meaning but no implementation yet. To ignore them would
// be worse than to refuse them.
var reservedKeys = []string{"vpc.geneve", "vpc.packet"}

// yaml applies a configuration file. It reports whether there is anything in it, be
// it wrong.
func (l *loader) yaml(path string, text []byte) (content bool) {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return false
	} else if err != nil {
		l.errorf("read %s: %s", path, oneLine(err))
		return true
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		l.errorf("read %s: holds more than one document: keep one", path)
		return true
	}
	f := &yamlFile{loader: l, path: path}
	root := resolve(doc.Content[0])
	f.mapping("", root, func(key, full string, value *yaml.Node) {
		f.value(key, full, value)
	})
	return !isNull(root)
}

type yamlFile struct {
	*loader
	path string
}

func (f *yamlFile) at(n *yaml.Node) string { return fmt.Sprintf("%s:%d", f.path, n.Line) }

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

func resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

// mapping calls each for the entries of a mapping.
func (f *yamlFile) mapping(prefix string, n *yaml.Node, each func(key, full string, value *yaml.Node)) {
	if isNull(n) {
		return
	}
	if n.Kind != yaml.MappingNode {
		name := strings.TrimSuffix(prefix, ".")
		if name == "" {
			name = "the file"
		}
		f.errorf("%s: %s: want keys with values, as in home: /var/lib/ztgate", f.at(n), name)
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		if seen[k.Value] {
			f.errorf("%s: %s%s is given twice: remove one", f.at(k), prefix, k.Value)
			continue
		}
		seen[k.Value] = true
		each(k.Value, prefix+k.Value, resolve(n.Content[i+1]))
	}
}

func (f *yamlFile) value(key, full string, n *yaml.Node) {
	for _, r := range reservedKeys {
		if full == r {
			f.errorf("%s: %s is not supported yet: remove it", f.at(n), full)
			return
		}
	}
	for _, s := range sections {
		if s.name() == full {
			s.load(f, n)
			return
		}
	}
	group := false
	for _, s := range settings {
		if s.key == full {
			f.setting(s, n)
			return
		}
		group = group || strings.HasPrefix(s.key, full+".")
	}
	if group {
		f.mapping(full+".", n, f.value)
		return
	}
	f.unknown(n, full, knownKeys())
}

func (f *yamlFile) unknown(n *yaml.Node, full string, known []string) {
	hint := ""
	if near := Nearest(full, known); near != "" {
		hint = near
	} else { // right name, wrong section
		leaf := full[strings.LastIndex(full, ".")+1:]
		for _, k := range known {
			if k[strings.LastIndex(k, ".")+1:] == leaf {
				hint = k
			}
		}
	}
	if hint != "" {
		f.errorf("%s: unknown key %s: did you mean %s?", f.at(n), full, hint)
		return
	}
	f.errorf("%s: unknown key %s: known here are %s", f.at(n), full, strings.Join(known, ", "))
}

// knownKeys lists all keys and sections of the file.
func knownKeys() []string {
	out := map[string]bool{}
	for _, s := range sections {
		out[s.name()] = true
	}
	for _, s := range settings {
		for i, r := range s.key {
			if r == '.' {
				out[s.key[:i]] = true
			}
		}
		out[s.key] = true
	}
	return mapKeys(out)
}

// scalars reads a scalar or a list of scalars.
func (f *yamlFile) scalars(full string, n *yaml.Node) ([]string, bool) {
	switch {
	case isNull(n):
		return nil, true
	case n.Kind == yaml.ScalarNode:
		return []string{n.Value}, true
	case n.Kind != yaml.SequenceNode:
		f.errorf("%s: %s: want a list", f.at(n), full)
		return nil, false
	}
	var out []string
	for _, item := range n.Content {
		item = resolve(item)
		if item.Kind != yaml.ScalarNode || isNull(item) {
			f.errorf("%s: %s: want a list of plain values", f.at(item), full)
			return nil, false
		}
		out = append(out, item.Value)
	}
	return out, true
}

func (f *yamlFile) setting(s *setting, n *yaml.Node) {
	if !s.list && (n.Kind != yaml.ScalarNode || isNull(n)) {
		if !isNull(n) {
			f.errorf("%s: %s: want one value", f.at(n), s.key)
		}
		return // a key without value keeps the default
	}
	if values, ok := f.scalars(s.key, n); ok {
		f.apply(s, values, "file "+f.at(n))
	}
}
