package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ztgate/router/config"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// didYouMean names the word that was probably meant, or all there are.
func didYouMean(s string, words []string) string {
	if near := config.Nearest(s, words); near != "" {
		return "did you mean " + near + "?"
	}
	return "use one of " + strings.Join(words, ", ")
}

// textValue is a text that check accepts.
type textValue struct {
	v     *string
	kind  string
	check func(string) error
}

func (t textValue) String() string {
	if t.v == nil { // the zero value, for pflag's comparison with the default
		return ""
	}
	return *t.v
}

func (t textValue) Set(s string) error {
	if err := t.check(s); err != nil {
		return err
	}
	*t.v = s
	return nil
}

func (t textValue) Type() string { return t.kind }

// wordFlag adds a flag that takes one of some words.
func wordFlag(fs *pflag.FlagSet, v *string, name, def string, words []string, usage string) {
	*v = def
	fs.Var(textValue{v, "string", func(s string) error {
		if !slices.Contains(words, s) {
			return errors.New(didYouMean(s, words))
		}
		return nil
	}}, name, usage)
}

// protocolFlag adds a flag that takes a protocol.
func protocolFlag(fs *pflag.FlagSet, v *string, name, usage string) {
	fs.Var(textValue{v, "string", func(s string) error {
		if n, err := strconv.ParseUint(s, 10, 8); err == nil && n > 0 || slices.Contains(protocols, s) {
			return nil
		}
		if near := config.Nearest(s, protocols); near != "" {
			return fmt.Errorf("did you mean %s?", near)
		}
		return errors.New("give tcp, udp, icmp or a number from 1 to 255")
	}}, name, usage)
}

var protocols = []string{"tcp", "udp", "icmp"}

// networkFlag adds a flag that takes the ID of a network.
func networkFlag(fs *pflag.FlagSet, v *string, name, usage string) {
	fs.Var(textValue{v, "string", func(s string) error { _, err := ztnode.ParseNetworkID(s); return err }}, name, usage)
}

// prefixFlag adds a flag that takes an address or a prefix.
func prefixFlag(fs *pflag.FlagSet, v *string, name, usage string) {
	fs.Var(textValue{v, "string", func(s string) error { _, err := config.ParsePrefix(s); return err }}, name, usage)
}

type durationValue struct {
	v      *time.Duration
	lo, hi time.Duration
}

// durationFlag adds a flag that takes a duration from lo to hi.
func durationFlag(fs *pflag.FlagSet, v *time.Duration, name, short string, def, lo, hi time.Duration, usage string) {
	*v = def
	fs.VarP(durationValue{v, lo, hi}, name, short, usage)
}

func (d durationValue) String() string {
	if d.v == nil {
		return ""
	}
	return d.v.String()
}

func (d durationValue) Set(s string) error {
	got, err := time.ParseDuration(s)
	if err != nil || got < d.lo || got > d.hi {
		return fmt.Errorf("give a duration from %v to %v, as in %v", d.lo, d.hi, d.v)
	}
	*d.v = got
	return nil
}

func (d durationValue) Type() string { return "duration" }

type countValue struct {
	v      *int
	lo, hi int
}

// countFlag adds a flag that takes a number from lo to hi. def may be below, and
// stands for none.
func countFlag(fs *pflag.FlagSet, v *int, name, short string, def, lo, hi int, usage string) {
	*v = def
	fs.VarP(countValue{v, lo, hi}, name, short, usage)
}

func (c countValue) String() string {
	if c.v == nil {
		return "0"
	}
	return strconv.Itoa(*c.v)
}

func (c countValue) Set(s string) error {
	n, err := strconv.Atoi(s)
	if err != nil || n < c.lo || n > c.hi {
		return fmt.Errorf("give a number from %d to %d", c.lo, c.hi)
	}
	*c.v = n
	return nil
}

func (c countValue) Type() string { return "int" }

// once refuses a flag that is given twice, of which pflag would take the last one, or
// without anything in it, as by a variable of a script that isn't set.
type once struct {
	pflag.Value
	given bool
}

func (o *once) Set(s string) error {
	switch {
	case o.given:
		return errors.New("given twice")
	case s == "":
		return errors.New("is empty: give a value or leave the flag out")
	}
	o.given = true
	return o.Value.Set(s)
}

// strict makes all flags of a command and those below it refuse what is given twice.
// Settings do so themselves.
func strict(cmd *cobra.Command) {
	for _, fs := range []*pflag.FlagSet{cmd.Flags(), cmd.PersistentFlags()} {
		fs.VisitAll(func(f *pflag.Flag) {
			switch v := f.Value.(type) {
			case settingValue, pflag.SliceValue, *once:
			default:
				f.Value = &once{Value: v}
			}
		})
	}
	for _, sub := range cmd.Commands() {
		strict(sub)
	}
}

// unknownCommand refuses a command, and names the one that was meant.
func unknownCommand(parent *cobra.Command, name string) error {
	var names []string
	for _, c := range parent.Commands() {
		if c.IsAvailableCommand() {
			names = append(append(names, c.Name()), c.Aliases...)
		}
	}
	if len(names) == 0 {
		return fault.Usagef("%s has no commands: leave out %q", parent.CommandPath(), name)
	}
	return fault.Usagef("%s: there is no command %q: %s", parent.CommandPath(), name, didYouMean(name, names))
}

// helpCommand shows the help of a command that exists.
func helpCommand() *cobra.Command {
	return &cobra.Command{Use: "help [COMMAND]", Short: "Show the help of a command",
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) (out []cobra.Completion, _ cobra.ShellCompDirective) {
			if c, rest, err := cmd.Root().Find(args); err == nil && len(rest) == 0 {
				for _, sub := range c.Commands() {
					if sub.IsAvailableCommand() {
						out = append(out, sub.Name())
					}
				}
			}
			return out, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			at := cmd.Root()
			for _, name := range args {
				i := slices.IndexFunc(at.Commands(), func(c *cobra.Command) bool { return c.Name() == name || c.HasAlias(name) })
				if i < 0 {
					return unknownCommand(at, name)
				}
				at = at.Commands()[i]
			}
			at.InitDefaultHelpFlag()
			return at.Help()
		}}
}
