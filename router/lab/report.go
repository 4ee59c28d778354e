package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"ztgate/router/control"
	"ztgate/zerotier/ztnode"
)

// Report says what the scenario did.
type Report struct {
	Checks []Check `json:"checks"`

	Network      string        `json:"network,omitempty"`
	Gateway      string        `json:"gateway,omitempty"` // node address
	Office       string        `json:"office,omitempty"`
	Ready        time.Duration `json:"readyNanoseconds"`      // gateway's start to ready
	FirstFetch   time.Duration `json:"firstFetchNanoseconds"` // first HTTPS page, with connection
	PingRTT      time.Duration `json:"pingNanoseconds"`
	SeenAs       string        `json:"seenAs,omitempty"` // client address in the office
	Path         string        `json:"path,omitempty"`   // DIRECT or RELAY
	Endpoint     string        `json:"endpoint,omitempty"`
	Download     Bulk          `json:"download"`
	Upload       Bulk          `json:"upload"`
	Flows        float64       `json:"flows"`
	FlowsCreated float64       `json:"flowsCreated"`
	Forwarded    []Forwarded   `json:"forwarded"`
	Drops        []string      `json:"drops"`
	LogDir       string        `json:"logDir,omitempty"`
	Logs         string        `json:"logs,omitempty"`  // last lines, after a failure
	Hints        []string      `json:"hints,omitempty"` // commands to go on with
}

// Check is one thing that had to work.
type Check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

// Bulk is a bulk transfer and what it cost the gateway.
type Bulk struct {
	Transfer
	CPU time.Duration `json:"gatewayCPUNanoseconds"`
}

// Forwarded is what went one way through the gateway.
type Forwarded struct {
	Path    string  `json:"path"`
	Packets float64 `json:"packets"`
	Bytes   float64 `json:"bytes"`
}

// ErrChecks says that some checks failed.
var ErrChecks = errors.New("checks failed")

func (r *Report) check(name string, err error, format string, args ...any) bool {
	c := Check{Name: name, OK: err == nil, Detail: fmt.Sprintf(format, args...)}
	if err != nil {
		c.Detail = err.Error()
	}
	r.Checks = append(r.Checks, c)
	return c.OK
}

// Err returns an error that names the failed checks.
func (r *Report) Err() error {
	var failed []string
	for _, c := range r.Checks {
		if !c.OK {
			failed = append(failed, c.Name)
		}
	}
	if len(failed) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrChecks, strings.Join(failed, ", "))
}

const (
	stepTimeout  = 15 * time.Second
	directWithin = 15 * time.Second // for the direct path to be found
)

// Check runs traffic through the scenario and writes down what happened.
func (s *Scenario) Check(r *Report) error {
	r.Network, r.Gateway, r.Office = s.Network.String(), s.GatewayMember, s.OfficeAddr
	r.Ready = s.ReadyAfter()
	r.check("gateway ready", nil, "%s after its start", round(r.Ready))

	client := s.Client()
	defer client.CloseIdleConnections()
	s.checkFetch(r, client)
	s.checkPing(r)
	s.checkPath(r)
	fmt.Fprintln(s.opts.Progress, "bulk transfer from the office")
	s.checkBulk(r, "download", &r.Download, client, download)
	fmt.Fprintln(s.opts.Progress, "bulk transfer to the office")
	s.checkBulk(r, "upload", &r.Upload, client, upload)
	if s.gatewayRef == nil {
		s.checkMetrics(r)
	}
	return r.Err()
}

func (s *Scenario) step() (context.Context, context.CancelFunc) {
	return context.WithTimeout(s.Context(), stepTimeout)
}

func (s *Scenario) checkFetch(r *Report, client *http.Client) {
	ctx, cancel := s.step()
	defer cancel()
	start := time.Now()
	page, err := get(ctx, client, s.OfficeURL(true)+"/")
	if err == nil && !strings.Contains(page, "Office server") {
		err = fmt.Errorf("unexpected page %q", page)
	}
	r.FirstFetch = time.Since(start)
	if !r.check("HTTPS page", err, "%s/ in %s", s.OfficeURL(true), round(r.FirstFetch)) {
		return
	}
	r.SeenAs, err = get(ctx, client, s.OfficeURL(true)+pathWhoAmI)
	if err == nil && r.SeenAs != gwOverlay.String() {
		err = fmt.Errorf("the office sees %s, want the gateway's %s", r.SeenAs, gwOverlay)
	}
	r.check("source address", err, "%s in the VPC, %s in the office", clientVPC.Addr(), r.SeenAs)
}

func (s *Scenario) checkPing(r *Report) {
	ctx, cancel := s.step()
	defer cancel()
	const count = 3
	var sum time.Duration
	for range count {
		d, err := s.VPC.Ping(ctx, officeOverlay)
		if err != nil {
			r.check("ping", err, "")
			return
		}
		sum += d
	}
	r.PingRTT = sum / count
	r.check("ping", nil, "%s in %s on average", officeOverlay, round(r.PingRTT))
}

func (s *Scenario) checkPath(r *Report) {
	ctx, cancel := context.WithTimeout(s.Context(), directWithin)
	defer cancel()
	var suite string
	err := until(ctx, func() (err error) {
		r.Path, r.Endpoint, suite, err = linkTo(ctx, s.GatewayAPI, s.gatewayRef, s.OfficeAddr)
		return err
	})
	if r.check("direct path", err, "%s to %s at %s%s", r.Path, s.OfficeAddr, r.Endpoint, suite) {
		var back, endpoint string
		err = until(ctx, func() (err error) {
			back, endpoint, suite, err = linkTo(ctx, s.OfficeAPI, s.officeRef, s.GatewayMember)
			return err
		})
		r.check("and back", err, "%s to %s at %s%s", back, s.GatewayMember, endpoint, suite)
	}
}

// linkTo asks a node, ours or a reference one, how it reaches another. Anything
// but a direct path with the strongest cipher suite is an error.
func linkTo(ctx context.Context, ours *control.Client, ref *referenceAPI, address string) (link, endpoint, suite string, err error) {
	if ref != nil {
		link, endpoint, err = ref.link(ctx, address)
	} else {
		link, endpoint, suite, err = ownLink(ctx, ours, address)
	}
	if err == nil && link != "DIRECT" {
		err = fmt.Errorf("path to %s is %s", address, link)
	}
	return link, endpoint, suite, err
}

func ownLink(ctx context.Context, api *control.Client, address string) (link, endpoint, suite string, err error) {
	peers, err := api.Peers(ctx)
	if err != nil {
		return "", "", "", err
	}
	for _, p := range peers.Peers {
		if p.Address != address {
			continue
		}
		if p.Cipher != bestSuite {
			err = fmt.Errorf("packets to %s are sealed with cipher suite %d, want %d", address, p.Cipher, bestSuite)
		}
		return p.Link, preferred(p), fmt.Sprintf(", cipher suite %d", p.Cipher), err
	}
	return "", "", "", fmt.Errorf("peer %s isn't known", address)
}

// bestSuite is AES-GMAC-SIV, which all versions since 1.10 speak.
const bestSuite = 3

func preferred(p ztnode.Peer) string {
	for _, path := range p.Paths {
		if path.Preferred {
			return path.Endpoint.String()
		}
	}
	return "unknown"
}

func (s *Scenario) checkBulk(r *Report, name string, b *Bulk, client *http.Client,
	transfer func(context.Context, *http.Client, string, time.Duration, int) (Transfer, error)) {
	before, err1 := s.GatewayProcess.CPU()
	t, err := transfer(s.Context(), client, s.OfficeURL(false), s.opts.Duration, s.opts.Streams)
	after, err2 := s.GatewayProcess.CPU()
	b.Transfer, b.CPU = t, after-before
	if err == nil && t.Bytes == 0 {
		err = errors.New("no bytes arrived")
	}
	r.check(name, errors.Join(err, err1, err2), "%.0f Mbit/s, %d MB in %s, gateway used %.2f s of processor time",
		t.BitsPerSecond()/1e6, t.Bytes/1e6, round(t.Duration), b.CPU.Seconds())
}

func (s *Scenario) checkMetrics(r *Report) {
	ctx, cancel := s.step()
	defer cancel()
	m, err := s.Metrics(ctx)
	if err != nil {
		r.check("metrics", err, "")
		return
	}
	r.Flows, r.FlowsCreated = m.Sum("ztgate_flows", nil), m.Sum("ztgate_flows_created_total", nil)
	bytes := m.By("ztgate_forwarded_bytes_total", "path")
	packets := m.By("ztgate_forwarded_packets_total", "path")
	for _, path := range []string{"vpc_to_overlay", "overlay_to_vpc"} {
		r.Forwarded = append(r.Forwarded, Forwarded{path, packets[path], bytes[path]})
		sent := r.Upload.Bytes
		if path == "overlay_to_vpc" {
			sent = r.Download.Bytes
		}
		if bytes[path] < float64(sent) {
			err = errors.Join(err, fmt.Errorf("ztgate_forwarded_bytes_total{path=%q} is %.0f, but %d bytes went that way", path, bytes[path], sent))
		}
	}
	r.Drops = sortedNonZero(m.By("ztgate_dropped_packets_total", "reason"))
	r.check("metrics", err, "%.0f flows created, %.0f now", r.FlowsCreated, r.Flows)
}

func round(d time.Duration) time.Duration {
	switch {
	case d > time.Second:
		return d.Round(10 * time.Millisecond)
	case d > 10*time.Millisecond:
		return d.Round(100 * time.Microsecond)
	}
	return d.Round(time.Microsecond)
}

// networkOf reads the ID out of a network record.
func networkOf(rec json.RawMessage) (ztnode.NetworkID, error) {
	var r struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal(rec, &r); err != nil {
		return 0, fmt.Errorf("read network record: %w", err)
	}
	return ztnode.ParseNetworkID(r.ID)
}

// WriteText prints the report for people.
func (r *Report) WriteText(w io.Writer) {
	for _, c := range r.Checks {
		mark := "ok    "
		if !c.OK {
			mark = "FAILED"
		}
		fmt.Fprintf(w, "%s  %-16s %s\n", mark, c.Name, c.Detail)
	}
	for _, f := range r.Forwarded {
		fmt.Fprintf(w, "        %-16s %.0f packets, %.1f MB\n", f.Path, f.Packets, f.Bytes/1e6)
	}
	if len(r.Drops) > 0 {
		fmt.Fprintf(w, "        %-16s %s\n", "dropped", strings.Join(r.Drops, ", "))
	}
	if r.Logs != "" {
		fmt.Fprintf(w, "\nLast lines of the logs in %s:\n%s", r.LogDir, r.Logs)
	}
	if len(r.Hints) > 0 {
		fmt.Fprintf(w, "\nThe lab is up, logs are in %s. Try:\n", r.LogDir)
		for _, h := range r.Hints {
			fmt.Fprintln(w, "  "+h)
		}
	}
}
