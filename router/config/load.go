package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"ztgate/router/fault"
)

// Sources are where a configuration comes from, strongest first: flags,
// environment, file, defaults.
type Sources struct {
	Flags   map[string][]string // values of the flags that were given, by flag name
	Environ []string            // as os.Environ returns it
	NoFile  bool                // read a file only if one is named
	// Defaults are the defaults of a program that has others than the gateway's, by key.
	Defaults map[string]string
}

// Flag describes the flag of a setting.
type Flag struct {
	Name, Usage, Default string
	List, Boolean        bool
}

// Flags lists the flags of all settings.
func Flags() []Flag {
	var out []Flag
	for _, s := range settings {
		if s.flag != "" {
			out = append(out, Flag{s.flag, s.usage, strings.Join(s.def, ","), s.list, s.boolean})
		}
	}
	return out
}

// Location returns the control socket and the home that a command should use, and
// whether the home was chosen. A faulty configuration doesn't keep commands from
// working.
func Location(src Sources) (socket, home string, homeGiven bool) {
	cfg, err := Load(src)
	if err != nil {
		l := newLoader(src)
		for _, s := range settings {
			if s.key == "home" || s.key == "socket" {
				_ = s.set(l.cfg, l.def(s))
				if v := l.env[s.env()]; v != "" {
					l.apply(s, []string{v}, "environment")
				}
				if v, ok := src.Flags[s.flag]; ok {
					l.apply(s, v, "flag")
				}
			}
		}
		cfg = l.cfg
	}
	return cfg.Socket, cfg.Home, cfg.Origin("home") != "default"
}

// Load makes the configuration. Its error lists everything that is wrong, one
// line each.
func Load(src Sources) (*Config, error) { return load(src, "") }

// load makes the configuration. It must come from a file if one is running.
func load(src Sources, running string) (*Config, error) {
	l := newLoader(src)
	if err := l.read(running); err != nil {
		return nil, err
	}
	l.images()
	l.localConf()
	for _, p := range l.cfg.Underlay.Physical {
		if p.MTU != 0 && p.MTU < usualPhysicalMTU {
			l.warnf("physical: MTU %d of %s is below %d: a full frame takes six datagrams, and is lost with any of them", p.MTU, p.Network, usualPhysicalMTU)
		}
	}
	l.secrets()
	if len(l.errs) == 0 { // otherwise these would be consequences
		l.errs = append(l.errs, l.cfg.check()...)
	}
	if len(l.errs) > 0 {
		return nil, fault.Usage(errors.Join(l.errs...))
	}
	return l.finish(), nil
}

// read applies all sources, the weakest first.
func (l *loader) read(running string) error {
	src := l.cfg.sources
	for _, s := range settings {
		if err := s.set(l.cfg, l.def(s)); err != nil {
			return fmt.Errorf("default of %s: %w", s.key, err)
		}
	}
	l.file(src, running)
	l.environment()
	for _, s := range settings {
		if v, ok := src.Flags[s.flag]; ok && s.flag != "" {
			l.apply(s, v, "flag --"+s.flag)
		}
	}
	return nil
}

// finish returns the configuration as it is before any name is resolved.
func (l *loader) finish() *Config {
	c := l.cfg
	if len(c.Policy.Allow) > 0 && c.origin["policy.default"] == "" {
		c.Policy.Default, c.origin["policy.default"] = "drop", "policy.allow"
	}
	return c.Resolve(nil)
}

func newLoader(src Sources) *loader {
	l := &loader{cfg: &Config{origin: map[string]string{}, sources: src}, env: map[string]string{}}
	for _, kv := range src.Environ {
		k, v, _ := strings.Cut(kv, "=")
		l.env[k] = v
	}
	return l
}

// def returns the default of a setting.
func (l *loader) def(s *setting) []string {
	if d, ok := l.cfg.sources.Defaults[s.key]; ok {
		return []string{d}
	}
	return s.def
}

type loader struct {
	cfg  *Config
	env  map[string]string
	errs []error
}

func (l *loader) errorf(format string, args ...any) {
	l.errs = append(l.errs, fmt.Errorf(format, args...))
}

// apply sets a value. Empty items of lists are dropped.
func (l *loader) apply(s *setting, values []string, origin string) {
	if s.list {
		values = slices.DeleteFunc(slices.Clone(values), func(v string) bool { return v == "" })
	}
	if err := s.set(l.cfg, values); err != nil {
		shown := strings.Join(values, ",")
		if s.secret {
			shown = "(secret)"
		}
		l.errorf("%s (from %s): %q: %w", s.key, origin, shown, err)
		return
	}
	l.cfg.origin[s.key] = origin
}

// listFields cuts a list in an environment variable. ZeroTier's images separate
// by blanks, commas or semicolons.
func listFields(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune(", ;\t\n", r) })
}

func (l *loader) environment() {
	known := map[string]bool{"ZTGATE_CONFIG": true}
	for _, s := range settings {
		own := s.env()
		known[own] = true
		for _, name := range append([]string{own}, s.aliases...) {
			v, ok := l.env[name]
			if !ok || v == "" && (name != own || s.flag != "listen") {
				continue
			}
			if isServiceLink(v) && !s.list {
				continue
			}
			values := []string{v}
			if s.list {
				values = listFields(v)
			}
			l.apply(s, values, "environment "+name)
			break
		}
	}
	var unknown []string
	for name := range l.env {
		if strings.HasPrefix(name, "ZTGATE_") && !known[name] && !isServiceVariable(name) {
			unknown = append(unknown, name)
		}
	}
	slices.Sort(unknown)
	for _, name := range unknown {
		w := name + " is set but means nothing"
		if near := Nearest(name, mapKeys(known)); near != "" {
			w += ": did you mean " + near + "?"
		}
		l.cfg.Warnings = append(l.cfg.Warnings, w)
	}
}

// isServiceLink recognises what Kubernetes puts into NAME_PORT for a service
// called like this program.
func isServiceLink(v string) bool {
	return strings.HasPrefix(v, "tcp://") || strings.HasPrefix(v, "udp://")
}

func isServiceVariable(name string) bool {
	return strings.HasPrefix(name, "ZTGATE_SERVICE_") || strings.HasPrefix(name, "ZTGATE_PORT_")
}

func (l *loader) file(src Sources, running string) {
	path, explicit := DefaultConfig, false
	if v := l.env["ZTGATE_CONFIG"]; v != "" {
		path, explicit = v, true
	}
	if v := src.Flags["config"]; len(v) > 0 {
		path, explicit = v[len(v)-1], true // empty: no file
	}
	l.cfg.noFile = path == ""
	if path == "" || src.NoFile && !explicit {
		return
	}
	text, err := os.ReadFile(path)
	switch missing := errors.Is(err, fs.ErrNotExist); {
	case missing && path == running:
		l.errorf("configuration file %s is gone, and its policy would be: restore it, or restart with --config= to go on without a file", path)
	case missing && !explicit:
	case err != nil:
		l.errorf("read configuration file: %w", err)
	case l.yaml(path, text):
		l.cfg.file = path
	case path == running:
		l.errorf("configuration file %s is empty, and its policy would be: restore it, or write {} for the defaults", path)
	}
}

// secrets reads values given as file:PATH.
func (l *loader) secrets() {
	for key, field := range map[string]*string{
		"identity.secret": &l.cfg.IdentitySecret, "identity.public": &l.cfg.IdentityPublic, "webhook.secret": &l.cfg.Webhook.Secret,
	} {
		path, ok := strings.CutPrefix(*field, "file:")
		if !ok {
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			l.errorf("%s (from %s): %w", key, l.cfg.Origin(key), err)
			continue
		}
		*field = strings.TrimSpace(string(b))
	}
}
