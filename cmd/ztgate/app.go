package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// app is one invocation with its streams, so that it can be tested without a
// process.
type app struct {
	in          io.Reader
	out, errOut io.Writer
	environ     []string

	runGateway, runMember func(context.Context, *config.Config, *slog.Logger) error

	json    bool
	flags   map[string][]string // of the settings, as given
	running bool                // usage was right: errors are not about it
}

// main runs a command line and returns the exit code.
func (a *app) main(ctx context.Context, args []string) int {
	root := a.command()
	root.SetArgs(args)
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.errOut)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if !a.running {
		err = fault.Usage(err)
	}
	if log := a.finalLog(args); log != nil {
		log.Error("ztgate ends", "error", err, "exit_code", fault.ExitCode(err))
	} else if a.json || slices.Contains(args, "-j") || slices.Contains(args, "--json") {
		_ = json.NewEncoder(a.errOut).Encode(control.NewErrorView(err)) // nobody left to tell
	} else {
		text := err.Error()
		if !a.running {
			text = strings.Join(strings.Fields(text), " ") // suggestions come on lines of their own
		}
		for line := range strings.Lines(text) {
			fmt.Fprintln(a.errOut, "ztgate: "+strings.TrimSuffix(line, "\n"))
		}
		if !a.running {
			fmt.Fprintln(a.errOut, "Run ztgate help for the commands and their flags.")
		}
	}
	return fault.ExitCode(err)
}

// finalLog returns the log of a process that logs as JSON, so that its last line is
// read by what reads the others; nil for other commands.
func (a *app) finalLog(args []string) *slog.Logger {
	i := slices.IndexFunc(args, func(s string) bool { return s == "run" || s == "member" })
	if i < 0 || slices.ContainsFunc(args[:i], func(s string) bool { return !strings.HasPrefix(s, "-") }) {
		return nil
	}
	src := a.sources()
	src.NoFile = args[i] == "member"
	for j, s := range args { // flags behind a faulty one aren't parsed
		if v, ok := strings.CutPrefix(s, "--log-format="); ok {
			src.Flags["log-format"] = []string{v}
		} else if s == "--log-format" && j+1 < len(args) {
			src.Flags["log-format"] = args[j+1 : j+2]
		}
	}
	if log, asJSON := config.NewFinalLogger(a.errOut, src); asJSON {
		return log
	}
	return nil
}

// command returns the command tree.
func (a *app) command() *cobra.Command {
	a.flags = map[string][]string{}
	root := &cobra.Command{
		Use:   "ztgate",
		Short: "Gateway between a VPC and ZeroTier networks, all in userspace",
		Long: `Gateway between a VPC and ZeroTier networks, all in userspace.

Exit codes: 0 done, 1 the operation failed, 2 wrong usage or configuration,
3 ztgate is not running or not reachable, 4 not ready.`,
		SilenceErrors: true, SilenceUsage: true,
		PersistentPreRun: func(*cobra.Command, []string) { a.running = true },
	}
	root.PersistentFlags().BoolVarP(&a.json, "json", "j", false, "print JSON")
	a.settingFlags(root.PersistentFlags(), "home", "socket")
	root.AddCommand(a.runCommand(), a.memberCommand(), a.statusCommand(), a.infoCommand(), a.networksCommand(),
		a.peersCommand(), a.flowsCommand(), a.dropsCommand(), a.joinCommand(), a.leaveCommand(), a.explainCommand(), a.reloadCommand(), a.moonsCommand(), a.orbitCommand(), a.deorbitCommand(), a.pingCommand(), a.resolveCommand(), a.waitCommand(), a.doctorCommand(),
		a.healthCommand(), a.identityCommand(), a.planetCommand(), a.controllerCommand(), a.configCommand(),
		a.versionCommand())
	a.addLab(root)
	root.SetHelpCommand(helpCommand())
	root.SetOut(a.out)
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if !c.Runnable() { // cobra shows its help, whatever is asked for
			sub := c
			c.RunE = func(_ *cobra.Command, args []string) error {
				return unknownCommand(sub, strings.Join(args, " "))
			}
			c.Args = cobra.ArbitraryArgs
		}
	}
	strict(root)
	return root
}

// group returns a command that only holds others.
func group(use, short string, sub ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return unknownCommand(cmd, args[0])
		}
		return nil
	}}
	var names []string
	for _, s := range sub {
		names = append(names, s.Name())
	}
	cmd.RunE = func(*cobra.Command, []string) error {
		return fault.Usage(fmt.Errorf("%s: name one of its commands: %s", cmd.CommandPath(), strings.Join(names, ", ")))
	}
	cmd.AddCommand(sub...)
	return cmd
}

// settingValue collects what was given for a flag; the configuration checks it.
type settingValue struct {
	a    *app
	flag config.Flag
}

func (v settingValue) String() string {
	if v.a == nil { // the zero value, for pflag's comparison with the default
		return ""
	}
	if got, ok := v.a.flags[v.flag.Name]; ok {
		return strings.Join(got, ",")
	}
	return v.flag.Default
}

func (v settingValue) Set(s string) error {
	old, given := v.a.flags[v.flag.Name]
	if !v.flag.List {
		if given {
			return fmt.Errorf("given twice")
		}
		v.a.flags[v.flag.Name] = []string{s}
		return nil
	}
	v.a.flags[v.flag.Name] = append(old, strings.Split(s, ",")...)
	return nil
}

func (v settingValue) Type() string {
	switch {
	case v.flag.Boolean:
		return "bool"
	case v.flag.List:
		return "list"
	}
	return "string"
}

// settingFlags adds the flags of settings by name; without names, all but those
// that every command has.
func (a *app) settingFlags(fs *pflag.FlagSet, names ...string) {
	for _, f := range config.Flags() {
		everywhere := f.Name == "home" || f.Name == "socket"
		if len(names) == 0 && everywhere || len(names) > 0 && !slices.Contains(names, f.Name) {
			continue
		}
		flag := fs.VarPF(settingValue{a, f}, f.Name, "", f.Usage)
		if f.Boolean {
			flag.NoOptDefVal = "true"
		}
	}
	if len(names) == 0 || slices.Contains(names, "config") {
		fs.Var(settingValue{a, config.Flag{Name: "config", Default: config.DefaultConfig}}, "config", "configuration file")
	}
}

func (a *app) sources() config.Sources {
	return config.Sources{Flags: a.flags, Environ: a.environ}
}

func (a *app) client() *control.Client {
	return control.NewClient(control.ClientSocket(a.sources()))
}

// print writes v as JSON, or the table for people.
func (a *app) print(v any, table func(w io.Writer)) error {
	if a.json {
		enc := json.NewEncoder(a.out)
		enc.SetIndent("", " ")
		return enc.Encode(v)
	}
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	table(w)
	return w.Flush()
}

func row(w io.Writer, cells ...any) {
	for i, c := range cells {
		if i > 0 {
			fmt.Fprint(w, "\t")
		}
		text := ztnode.Printable(fmt.Sprint(c))
		if text == "" {
			text = "-"
		}
		fmt.Fprint(w, text)
	}
	fmt.Fprintln(w)
}

// show asks the running process and prints the answer.
func show[T any](a *app, use, short string, ask func(context.Context, *control.Client) (T, error), table func(io.Writer, T)) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		v, err := ask(cmd.Context(), a.client())
		if err != nil {
			return err
		}
		return a.print(v, func(w io.Writer) { table(w, v) })
	}}
}
