// Command ztbench measures ztgate: the Go benchmarks of the data path, and the
// lab's scenario end to end beside other gateways on the same topology, in one
// run. It needs root, iperf3 and nft, and for the comparison with zerotier-one
// its path in ZT_ONE. `make bench` runs it.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	var o options
	flag.StringVar(&o.binary, "ztgate", os.Getenv("ZTGATE"), "program to measure")
	flag.StringVar(&o.reference, "zerotier-one", os.Getenv("ZT_ONE"), "path of a zerotier-one to compare with")
	flag.StringVar(&o.prefix, "prefix", defaultPrefix, "of the names of namespaces")
	flag.StringVar(&o.out, "out", "", "results file (default bench/results/DATE.md)")
	flag.DurationVar(&o.duration, "duration", 5*time.Second, "length of each transfer")
	flag.IntVar(&o.rounds, "rounds", 3, "how often everything is measured; medians count")
	flag.BoolVar(&o.skipGo, "skip-go", false, "no Go benchmarks")
	flag.BoolVar(&o.skipE2E, "skip-e2e", false, "no end-to-end comparison")
	flag.BoolVar(&o.skipPlane, "skip-plane", false, "no comparison between two TUNs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "ztbench:", err)
		os.Exit(1)
	}
}

type options struct {
	binary, reference, out string
	prefix                 string
	duration               time.Duration
	rounds                 int
	skipGo, skipE2E        bool
	skipPlane              bool
}

func run(ctx context.Context, o options) error {
	if o.binary == "" && !o.skipE2E {
		return errors.New("name the program with -ztgate or ZTGATE (make bench does)")
	}
	if o.out == "" {
		o.out = filepath.Join("bench", "results", time.Now().UTC().Format("2006-01-02")+".md")
	}
	var report bytes.Buffer
	w := io.MultiWriter(os.Stdout, &report)
	fmt.Fprintf(w, "# Measurements of %s\n\n", time.Now().UTC().Format("2006-01-02 15:04 MST"))
	if err := describeMachine(w); err != nil {
		return err
	}
	if !o.skipE2E {
		if err := endToEnd(ctx, w, o); err != nil {
			return err
		}
	}
	if !o.skipPlane {
		if err := planeOnly(ctx, w, o); err != nil {
			return err
		}
	}
	if !o.skipGo {
		if err := goBenchmarks(ctx, w); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(o.out), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(o.out, report.Bytes(), 0o644); err != nil {
		return err
	}
	fmt.Println("\nwritten to", o.out)
	return nil
}

// describeMachine prints what the figures depend on.
func describeMachine(w io.Writer) error {
	cpu := "unknown processor"
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err
	}
	cores := 0
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			cpu = strings.TrimSpace(v)
			cores++
		}
	}
	var u syscall.Utsname
	if err := syscall.Uname(&u); err != nil {
		return err
	}
	version, err := exec.Command("go", "version").Output()
	if err != nil {
		return fmt.Errorf("go version: %w", err)
	}
	revision, err := exec.Command("git", "describe", "--always", "--dirty").Output()
	if err != nil {
		revision = []byte("unknown")
	}
	fmt.Fprintf(w, "%d x %s, Linux %s, %s, revision %s.\n\n", cores, cpu, text(u.Release[:]),
		strings.TrimSpace(string(version)), strings.TrimSpace(string(revision)))
	fmt.Fprintln(w, "All hosts of the scenario, the load generators included, share this machine: compare the rows of one run,")
	fmt.Fprintln(w, "not absolute figures of different machines or days.")
	fmt.Fprintln(w)
	return nil
}

func text(b []int8) string {
	var s strings.Builder
	for _, c := range b {
		if c == 0 {
			break
		}
		s.WriteByte(byte(c))
	}
	return s.String()
}

// goBenchmarks runs the benchmarks of the data path.
func goBenchmarks(ctx context.Context, w io.Writer) error {
	fmt.Fprint(w, "\n## Go benchmarks\n\n```\n")
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", ".", "-benchmem", "-benchtime", "0.5s",
		"./zerotier/packet", "./zerotier/vl1", "./zerotier/vl2", "./bench/...")
	out, err := cmd.CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "Benchmark") || strings.HasPrefix(line, "pkg:") {
			fmt.Fprint(w, line)
		}
	}
	fmt.Fprint(w, "```\n")
	if err != nil {
		return fmt.Errorf("go benchmarks: %w\n%s", err, out)
	}
	return nil
}
