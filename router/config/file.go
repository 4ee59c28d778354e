package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"go.yaml.in/yaml/v3"

	"ztgate/zerotier/ztnode"
)

// reserved keys have a meaning but no implementation yet. To ignore them would
// be worse than to refuse them.
var reservedKeys = []string{"vpc.geneve", "vpc.packet"}

// yaml applies a configuration file.
func (l *loader) yaml(path string, text []byte) {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return // empty
	} else if err != nil {
		l.errorf("read %s: %s", path, oneLine(err))
		return
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		l.errorf("read %s: holds more than one document: keep one", path)
		return
	}
	f := &yamlFile{loader: l, path: path}
	f.mapping("", resolve(doc.Content[0]), func(key, full string, value *yaml.Node) {
		f.value(key, full, value)
	})
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
	switch full {
	case "networks":
		f.networks(n)
		return
	case "policy.rules":
		f.rules(n)
		return
	case "forwards":
		f.forwards(n)
		return
	case "maps":
		f.maps(n)
		return
	case "physical":
		f.physical(n)
		return
	case "virtual":
		f.virtual(n)
		return
	}
	section := false
	for _, s := range settings {
		if s.key == full {
			f.setting(s, n)
			return
		}
		section = section || strings.HasPrefix(s.key, full+".")
	}
	if section {
		f.mapping(full+".", n, f.value)
		return
	}
	f.unknown(n, full, knownKeys())
}

func (f *yamlFile) unknown(n *yaml.Node, full string, known []string) {
	hint := ""
	if near := nearest(full, known); near != "" {
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
	out := map[string]bool{"networks": true, "policy.rules": true, "physical": true, "virtual": true, "forwards": true, "maps": true}
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

// entries calls each for the mappings of a list.
func (f *yamlFile) entries(key, example string, n *yaml.Node, each func(item *yaml.Node)) {
	if isNull(n) {
		return
	}
	if n.Kind != yaml.SequenceNode {
		f.errorf("%s: %s: want a list, as in - %s", f.at(n), key, example)
		return
	}
	f.cfg.origin[key] = "file " + f.at(n)
	for _, item := range n.Content {
		each(resolve(item))
	}
}

var networkKeys = []string{"id", "masquerade", "allow_global", "allow_default"}

func (f *yamlFile) networks(n *yaml.Node) {
	f.entries("networks", `id: "8056c2e21c000001"`, n, func(item *yaml.Node) {
		var nc NetworkConfig
		idAt := item
		id := item.Value
		var keys []string
		if item.Kind != yaml.ScalarNode {
			id = ""
			f.mapping("networks.", item, func(key, full string, v *yaml.Node) {
				keys = append(keys, key)
				switch key {
				case "id":
					id, idAt = v.Value, v
				case "masquerade":
					b := f.boolean(full, v)
					nc.Masquerade = &b
				case "allow_global":
					nc.AllowGlobal = f.boolean(full, v)
				case "allow_default":
					nc.AllowDefault = f.boolean(full, v)
				default:
					f.unknown(v, full, prefixed("networks.", networkKeys))
				}
			})
		}
		var err error
		if nc.ID, err = ztnode.ParseNetworkID(id); err != nil {
			f.errorf("%s: networks.id: %q: want 16 hex digits, as in 8056c2e21c000001", f.at(idAt), id)
			return
		}
		for _, k := range keys {
			f.cfg.origin["networks."+nc.ID.String()+"."+k] = "file " + f.at(item)
		}
		f.cfg.Networks = append(f.cfg.Networks, nc)
	})
}

func (f *yamlFile) boolean(full string, n *yaml.Node) bool {
	b, err := parseBool(n.Value)
	if err != nil {
		f.errorf("%s: %s: %q: %w", f.at(n), full, n.Value, err)
	}
	return b
}

func prefixed(prefix string, words []string) []string {
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = prefix + w
	}
	return out
}

var ruleKeys = []string{"action", "proto", "from", "to", "ports", "direction", "network"}

func (f *yamlFile) rules(n *yaml.Node) {
	f.entries("policy.rules", "{action: accept, proto: tcp, ports: [443]}", n, func(item *yaml.Node) {
		var r PolicyRule
		f.mapping("policy.rules.", item, func(key, full string, v *yaml.Node) { f.rule(&r, key, full, v) })
		if r.Action == "" {
			f.errorf("%s: policy.rules: a rule has no action: use one of %s", f.at(item), strings.Join(actions, ", "))
		}
		f.cfg.Policy.Rules = append(f.cfg.Policy.Rules, r)
	})
}

func (f *yamlFile) rule(r *PolicyRule, key, full string, v *yaml.Node) {
	switch key {
	case "action":
		r.Action = f.oneOf(full, v, actions)
	case "proto":
		r.Proto = f.oneOf(full, v, []string{"tcp", "udp", "icmp"})
	case "from":
		r.From = items(f, full, v, ParsePrefix)
	case "to":
		r.To = items(f, full, v, ParsePrefix)
	case "ports":
		r.Ports = items(f, full, v, parsePorts)
	case "direction":
		r.Direction = f.oneOf(full, v, []string{"out", "in"})
	case "network":
		r.Network = f.network(full, v)
	default:
		f.unknown(v, full, prefixed("policy.rules.", ruleKeys))
	}
}

func (f *yamlFile) network(full string, n *yaml.Node) ztnode.NetworkID {
	id, err := ztnode.ParseNetworkID(n.Value)
	if err != nil {
		f.errorf("%s: %s: %q: want 16 hex digits, as in 8056c2e21c000001", f.at(n), full, n.Value)
	}
	return id
}

func (f *yamlFile) oneOf(full string, n *yaml.Node, words []string) string {
	for _, w := range words {
		if n.Value == w {
			return w
		}
	}
	f.errorf("%s: %s: %q: use one of %s", f.at(n), full, n.Value, strings.Join(words, ", "))
	return words[0]
}

func items[T netip.Prefix | netip.AddrPort | PortRange](f *yamlFile, full string, n *yaml.Node, parse func(string) (T, error)) []T {
	values, ok := f.scalars(full, n)
	if ok && len(values) == 0 { // would match everything, which nobody means
		f.errorf("%s: %s: is empty: give a value or remove the key", f.at(n), full)
	}
	var out []T
	for _, v := range values {
		t, err := parse(v)
		if err != nil {
			f.errorf("%s: %s: %q: %w", f.at(n), full, v, err)
			continue
		}
		out = append(out, t)
	}
	return out
}
