// Package rulelang compiles ZeroTier's rule language, the one that network
// administrators write, into rules tables:
//
//	# only IP and ARP
//	drop not ethertype ipv4 and not ethertype arp and not ethertype ipv6;
//	tag department id 1000 enum 100 sales enum 200 engineering default sales;
//	cap superuser id 1 accept;;
//	macro allow($port) accept ipprotocol tcp and dport $port;;
//	include allow(443)
//	accept tdiff department 0;
//	drop;
//
// An action block begins with drop, accept, break, priority, tee LENGTH ADDRESS,
// watch LENGTH ADDRESS or redirect ADDRESS, has matches joined by and, or and not,
// and ends with a semicolon. What can't be encoded is an error: a match left out
// would turn "drop if A and B" into "drop if A".
package rulelang

import (
	"fmt"
	"slices"
	"strings"
	"unicode"

	"ztgate/zerotier/vl2"
)

// Bounds.
const (
	MaxSource   = 256 << 10 // bytes
	maxDepth    = 16        // macros in macros
	maxSteps    = 65536     // blocks rendered
	maxCapRules = 64
)

// Program is a compiled source.
type Program struct {
	Rules        []vl2.Rule
	Capabilities []Capability // in the order of the source
	Tags         []Tag
}

// Capability is a named set of rules.
type Capability struct {
	Name    string
	ID      uint32
	Default bool
	Rules   []vl2.Rule
}

// Tag is a tag with the names of its values.
type Tag struct {
	Name    string
	ID      uint32
	Default *uint32
	Enums   map[string]uint32
	Flags   map[string]uint32 // masks
}

// value reads a value of the tag: a name or a number.
func (t *Tag) value(s string) (uint32, bool) {
	if t != nil {
		if v, ok := t.Flags[strings.ToLower(s)]; ok {
			return v, true
		}
		if v, ok := t.Enums[strings.ToLower(s)]; ok {
			return v, true
		}
	}
	v, ok := number(s, 1<<32-1)
	return uint32(v), ok
}

// actions are the words that begin a block of rules, and how many arguments they have.
var actions = map[string]int{"drop": 0, "accept": 0, "break": 0, "priority": 0, "tee": 2, "watch": 2, "redirect": 1}

// statement is an action block or an include.
type statement struct {
	head word   // action or "include"
	args []word // of the action; of include its macro
	body []word // matches
}

type macro struct {
	params []string
	body   []statement
}

type compiler struct {
	words  []word
	tags   map[string]*Tag
	caps   map[string]bool
	macros map[string]*macro
	out    Program
	steps  int
}

type capSource struct {
	index int
	body  []statement
}

// Compile compiles a source. Errors are of type [*Error].
func Compile(src string) (*Program, error) {
	if len(src) > MaxSource {
		return nil, &Error{Message: fmt.Sprintf("the source is longer than %d bytes", MaxSource)}
	}
	c := &compiler{words: split(src), tags: map[string]*Tag{}, caps: map[string]bool{}, macros: map[string]*macro{}}
	var base []statement
	var caps []capSource
	for len(c.words) > 0 {
		var err error
		switch w := c.words[0]; w.lower() {
		case ";": // ends nothing
			c.words = c.words[1:]
		case "macro":
			err = c.macro()
		case "tag":
			err = c.tag()
		case "cap":
			var body []statement
			if body, err = c.capability(); err == nil {
				caps = append(caps, capSource{len(c.out.Capabilities) - 1, body})
			}
		default:
			var s statement
			if s, err = c.statement(); err == nil {
				base = append(base, s)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	rules, err := c.render(nil, base, nil, vl2.MaxRules, 0)
	if err != nil {
		return nil, err
	}
	c.out.Rules = rules
	for _, x := range caps {
		if c.out.Capabilities[x.index].Rules, err = c.render(nil, x.body, nil, maxCapRules, 0); err != nil {
			return nil, err
		}
	}
	if len(c.out.Capabilities) > vl2.MaxCapabilities || len(c.out.Tags) > vl2.MaxTags {
		return nil, &Error{Message: fmt.Sprintf("more than %d capabilities or %d tags", vl2.MaxCapabilities, vl2.MaxTags)}
	}
	return &c.out, nil
}

// next takes a word; the end or a semicolon is an error.
func (c *compiler) next(after word, what string) (word, error) {
	if len(c.words) == 0 || c.words[0].text == ";" {
		return word{}, after.fail("%s: %s is missing", after.text, what)
	}
	w := c.words[0]
	c.words = c.words[1:]
	return w, nil
}

// name takes the name in a definition.
func (c *compiler) name() (head, name word, err error) {
	head = c.words[0]
	c.words = c.words[1:]
	name, err = c.next(head, "the name")
	return head, name, err
}

func (w word) checkName() error {
	name := w.lower()
	if _, ok := matches[name]; ok || actions[name] > 0 || slices.Contains(reserved, name) {
		return w.fail("%s is a reserved word", name)
	}
	for i, r := range name {
		if r != '_' && !unicode.IsLetter(r) && (i == 0 || !unicode.IsDigit(r)) {
			return w.fail("%q is no name: use letters, digits and _", name)
		}
	}
	return nil
}

var reserved = []string{"macro", "tag", "cap", "default", "drop", "accept", "break", "priority", "type", "enum", "flag", "id",
	"class", "define", "import", "include", "log", "not", "xor", "or", "and", "set", "var", "let"}

// call splits name(a,b).
func (w word) call() (name word, args []word, err error) {
	text, rest, ok := strings.Cut(w.text, "(")
	name = word{text, w.line, w.col}
	if !ok {
		return name, nil, nil
	}
	if !strings.HasSuffix(rest, ")") || strings.ContainsAny(rest[:len(rest)-1], "()") {
		return name, nil, w.fail("%q: write NAME(ARGUMENT,ARGUMENT)", w.text)
	}
	for _, a := range strings.Split(rest[:len(rest)-1], ",") {
		if a != "" {
			args = append(args, word{a, w.line, w.col})
		}
	}
	return name, args, nil
}

// macro reads macro NAME($A,$B) STATEMENTS;
func (c *compiler) macro() error {
	head, w, err := c.name()
	if err != nil {
		return err
	}
	name, args, err := w.call()
	if err != nil {
		return err
	}
	if err := name.checkName(); err != nil {
		return err
	}
	if c.macros[name.lower()] != nil {
		return name.fail("macro %s is defined twice", name.text)
	}
	m := &macro{}
	for _, a := range args {
		if !strings.HasPrefix(a.text, "$") || slices.Contains(m.params, a.lower()) {
			return a.fail("%q: parameters begin with $ and differ", a.text)
		}
		m.params = append(m.params, a.lower())
	}
	if m.body, err = c.statements(head); err != nil {
		return err
	}
	c.macros[name.lower()] = m
	return nil
}

// statements reads what is inside a macro, up to its semicolon.
func (c *compiler) statements(head word) (out []statement, err error) {
	for {
		if len(c.words) == 0 {
			return nil, head.fail("%s has no ; at its end", head.text)
		}
		if c.words[0].text == ";" {
			c.words = c.words[1:]
			return out, nil
		}
		s, err := c.statement()
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
}

// statement reads an action block or an include. The latter needs no semicolon.
func (c *compiler) statement() (s statement, err error) {
	s.head = c.words[0]
	c.words = c.words[1:]
	if s.head.lower() == "include" {
		w, err := c.next(s.head, "the macro's name")
		s.args = []word{w}
		return s, err
	}
	n, ok := actions[s.head.lower()]
	if !ok {
		return s, s.head.fail("%q is no action", s.head.text)
	}
	for range n {
		w, err := c.next(s.head, "an argument")
		if err != nil {
			return s, err
		}
		s.args = append(s.args, w)
	}
	for {
		if len(c.words) == 0 {
			return s, s.head.fail("%s has no ; at its end", s.head.text)
		}
		w := c.words[0]
		c.words = c.words[1:]
		if w.text == ";" {
			return s, nil
		}
		s.body = append(s.body, w)
	}
}

// id reads the number after id.
func (c *compiler) id(after word) (uint32, error) {
	w, err := c.next(after, "a number")
	if err != nil {
		return 0, err
	}
	v, ok := number(w.text, 1<<32-1)
	if !ok {
		return 0, w.fail("id %q: give a number from 0 to 4294967295", w.text)
	}
	return uint32(v), nil
}

// capability reads cap NAME id N [default] STATEMENTS;
func (c *compiler) capability() ([]statement, error) {
	head, name, err := c.name()
	if err != nil {
		return nil, err
	}
	if err := name.checkName(); err != nil {
		return nil, err
	}
	if c.caps[name.lower()] {
		return nil, name.fail("capability %s is defined twice", name.text)
	}
	c.caps[name.lower()] = true
	out := Capability{Name: name.lower()}
	hasID := false
	var body []statement
	for {
		if len(c.words) == 0 {
			return nil, head.fail("cap has no ; at its end")
		}
		w := c.words[0]
		switch w.lower() {
		case "id":
			c.words = c.words[1:]
			if hasID {
				return nil, w.fail("capability %s has two ids", name.text)
			}
			hasID = true
			if out.ID, err = c.id(w); err != nil {
				return nil, err
			}
			continue
		case "default":
			c.words = c.words[1:]
			out.Default = true
			continue
		case ";":
			c.words = c.words[1:]
			if !hasID {
				return nil, name.fail("capability %s has no id", name.text)
			}
			if slices.ContainsFunc(c.out.Capabilities, func(x Capability) bool { return x.ID == out.ID }) {
				return nil, name.fail("capability %s has the id of another one", name.text)
			}
			c.out.Capabilities = append(c.out.Capabilities, out)
			return body, nil
		}
		s, err := c.statement()
		if err != nil {
			return nil, err
		}
		body = append(body, s)
	}
}

// tag reads tag NAME id N [enum VALUE NAME] [flag BITS NAME] [default VALUE];
func (c *compiler) tag() error {
	_, name, err := c.name()
	if err != nil {
		return err
	}
	if err := name.checkName(); err != nil {
		return err
	}
	if c.tags[name.lower()] != nil {
		return name.fail("tag %s is defined twice", name.text)
	}
	t := &Tag{Name: name.lower(), Enums: map[string]uint32{}, Flags: map[string]uint32{}}
	hasID := false
	var def word
	for {
		if len(c.words) == 0 {
			return name.fail("tag %s has no ; at its end", name.text)
		}
		w := c.words[0]
		c.words = c.words[1:]
		switch w.lower() {
		case ";":
			if !hasID {
				return name.fail("tag %s has no id", name.text)
			}
			if slices.ContainsFunc(c.out.Tags, func(x Tag) bool { return x.ID == t.ID }) {
				return name.fail("tag %s has the id of another one", name.text)
			}
			if def.text != "" {
				v, ok := t.value(def.text)
				if !ok {
					return def.fail("default %q is no value of tag %s", def.text, name.text)
				}
				t.Default = &v
			}
			c.tags[t.Name] = t
			c.out.Tags = append(c.out.Tags, *t)
			return nil
		case "id":
			if hasID {
				return w.fail("tag %s has two ids", name.text)
			}
			hasID = true
			if t.ID, err = c.id(w); err != nil {
				return err
			}
		case "default":
			if def, err = c.next(w, "a value"); err != nil {
				return err
			}
		case "enum", "flag":
			if err := c.tagValue(t, w); err != nil {
				return err
			}
		default:
			return w.fail("%q has no place in a tag: id, enum, flag or default", w.text)
		}
	}
}

func (c *compiler) tagValue(t *Tag, kind word) error {
	value, err := c.next(kind, "a value")
	if err != nil {
		return err
	}
	name, err := c.next(kind, "a name")
	if err != nil {
		return err
	}
	if err := name.checkName(); err != nil {
		return err
	}
	into := t.Enums
	var v uint32
	if kind.lower() == "flag" {
		into = t.Flags
		for _, bit := range strings.Split(value.lower(), ",") {
			if mask, ok := t.Flags[bit]; ok {
				v |= mask
				continue
			}
			n, ok := number(bit, 31)
			if !ok {
				return value.fail("flag %q: give bits from 0 to 31 or names of flags", value.text)
			}
			v |= 1 << n
		}
	} else {
		n, ok := number(value.text, 1<<32-1)
		if !ok {
			return value.fail("enum %q: give a number from 0 to 4294967295", value.text)
		}
		v = uint32(n)
	}
	if _, ok := into[name.lower()]; ok {
		return name.fail("%s is defined twice", name.text)
	}
	into[name.lower()] = v
	return nil
}
