package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"ztgate/router/config"
	"ztgate/router/fault"
)

// Client talks to a running process over its control socket.
type Client struct {
	path string
	http *http.Client
}

// ClientSocket returns the control socket that a command should use.
func ClientSocket(src config.Sources) string { return findSocket(config.Location(src)) }

// findSocket returns the control socket to use: the given one; else that of an
// explicitly chosen home; else the default one; else that of the default home.
func findSocket(socket, home string, homeGiven bool) string {
	inHome := homeSocket(home)
	switch {
	case socket != "":
		return socket
	case homeGiven:
		return inHome
	}
	if _, err := os.Stat(config.DefaultSocket); err == nil {
		return config.DefaultSocket
	}
	if _, err := os.Stat(inHome); err == nil {
		return inHome
	}
	return config.DefaultSocket
}

// NewClient returns a client of a control socket. It does not connect yet.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: 2 * time.Minute}}
}

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://ztgate"+path, body)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.unreachable(ctx, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 256<<20))
	if err != nil {
		return c.unreachable(ctx, err)
	}
	if resp.StatusCode != http.StatusOK {
		var e ErrorView
		if json.Unmarshal(b, &e) == nil && e.Error.Message != "" {
			return &fault.Error{Kind: e.Error.Kind, Err: errors.New(e.Error.Message)}
		}
		return fmt.Errorf("ask %s: unexpected answer %s", c.path, resp.Status)
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("decode the answer of %s: %w", c.path, err)
	}
	return nil
}

func (c *Client) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = fmt.Errorf("ztgate is not running: no control socket %s (choose another with --socket or --home)", c.path)
	case errors.Is(err, fs.ErrPermission):
		err = fmt.Errorf("control socket %s: permission denied: run as root or as a member of its group", c.path)
	default:
		err = fmt.Errorf("ztgate is not reachable over %s: %w", c.path, err)
	}
	return &fault.Error{Kind: fault.KindNotRunning, Err: err}
}

func call[T any](ctx context.Context, c *Client, method, path string, in any) (T, error) {
	var out T
	err := c.do(ctx, method, path, in, &out)
	return out, err
}

// Status returns one screen.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return call[Status](ctx, c, "GET", "/v1/status", nil)
}

// Info describes the node.
func (c *Client) Info(ctx context.Context) (Info, error) {
	return call[Info](ctx, c, "GET", "/v1/info", nil)
}

// Health says what is missing for readiness.
func (c *Client) Health(ctx context.Context) (Health, error) {
	return call[Health](ctx, c, "GET", "/v1/health", nil)
}

// Networks lists the joined networks.
func (c *Client) Networks(ctx context.Context) (Networks, error) {
	return call[Networks](ctx, c, "GET", "/v1/networks", nil)
}

// Peers lists the peers.
func (c *Client) Peers(ctx context.Context) (Peers, error) {
	return call[Peers](ctx, c, "GET", "/v1/peers", nil)
}

// Config returns the configuration that is in force.
func (c *Client) Config(ctx context.Context) (Configuration, error) {
	return call[Configuration](ctx, c, "GET", "/v1/config", nil)
}

// FlowQuery selects flows; empty fields match all.
type FlowQuery struct {
	To, From        string // ADDRESS or ADDRESS/BITS
	Protocol, State string
	Network         string
	Top             int // the busiest only; 0 = all
}

// Flows lists flows.
func (c *Client) Flows(ctx context.Context, f FlowQuery) (Flows, error) {
	q := url.Values{}
	for k, v := range map[string]string{"to": f.To, "from": f.From, "protocol": f.Protocol, "state": f.State, "network": f.Network} {
		if v != "" {
			q.Set(k, v)
		}
	}
	if f.Top != 0 {
		q.Set("top", strconv.Itoa(f.Top))
	}
	return call[Flows](ctx, c, "GET", "/v1/flows?"+q.Encode(), nil)
}

// Drops lists the packets that were dropped last.
func (c *Client) Drops(ctx context.Context) (Drops, error) {
	return call[Drops](ctx, c, "GET", "/v1/drops", nil)
}

// Join joins a network, also at later starts.
func (c *Client) Join(ctx context.Context, id string) (Networks, error) {
	return call[Networks](ctx, c, "POST", "/v1/networks/"+url.PathEscape(id), nil)
}

// Leave leaves a network.
func (c *Client) Leave(ctx context.Context, id string) (Networks, error) {
	return call[Networks](ctx, c, "DELETE", "/v1/networks/"+url.PathEscape(id), nil)
}

// Reload makes the gateway read its configuration again.
func (c *Client) Reload(ctx context.Context) (Reloaded, error) {
	return call[Reloaded](ctx, c, "POST", "/v1/reload", nil)
}

// Explain asks what would happen to a packet.
func (c *Client) Explain(ctx context.Context, q Question) (Explanation, error) {
	return call[Explanation](ctx, c, "POST", "/v1/explain", q)
}

// Doctor walks along the ways to targets.
func (c *Client) Doctor(ctx context.Context, req DiagnosisRequest) (Diagnosis, error) {
	return call[Diagnosis](ctx, c, "POST", "/v1/doctor", req)
}

// Moons lists the moons in use.
func (c *Client) Moons(ctx context.Context) (Moons, error) {
	return call[Moons](ctx, c, "GET", "/v1/moons", nil)
}

// Orbit begins to use a moon; seed is the address of one of its roots, empty if it
// is the one that the moon is named after.
func (c *Client) Orbit(ctx context.Context, id, seed string) (Moons, error) {
	return call[Moons](ctx, c, "POST", "/v1/moons/"+url.PathEscape(id)+"?seed="+url.QueryEscape(seed), nil)
}

// Deorbit ends the use of a moon.
func (c *Client) Deorbit(ctx context.Context, id string) (Moons, error) {
	return call[Moons](ctx, c, "DELETE", "/v1/moons/"+url.PathEscape(id), nil)
}

// Ping pings through the overlay.
func (c *Client) Ping(ctx context.Context, req PingRequest) (Ping, error) {
	return call[Ping](ctx, c, "POST", "/v1/ping", req)
}

// Resolve asks what a client would be told of a name.
func (c *Client) Resolve(ctx context.Context, req ResolveRequest) (Resolved, error) {
	return call[Resolved](ctx, c, "POST", "/v1/resolve", req)
}

// pollEvery is how often Wait asks.
const pollEvery = 200 * time.Millisecond

// Wait waits until the node is online or the gateway ready, or ctx ends; its
// error then says what was missing last.
func (c *Client) Wait(ctx context.Context, what string) (Health, error) {
	if what != "online" && what != "ready" {
		return Health{}, fault.Usagef("wait for %q: give online or ready", what)
	}
	for {
		h, err := c.lastHealth(ctx)
		switch {
		case err == nil && (what == "ready" && h.Ready || what == "online" && h.Online):
			return h, nil
		case err == nil && what == "online":
			err = fault.NotReady("not online: %s", h.reason("online"))
		case err == nil:
			err = fault.NotReady("not ready: %s", strings.Join(h.Reasons, "; "))
		case fault.KindOf(err) != fault.KindNotRunning:
			return h, err
		}
		select {
		case <-ctx.Done():
			return h, err
		case <-time.After(pollEvery):
		}
	}
}

// answerTimeout bounds one question.
const answerTimeout = 5 * time.Second

// lastHealth asks even when ctx is about to reach its deadline, so that there is
// always something to say; it stops when ctx is cancelled.
func (c *Client) lastHealth(ctx context.Context) (Health, error) {
	rctx, cancel := beyondDeadline(ctx)
	defer cancel()
	return c.Health(rctx)
}

// beyondDeadline returns a context for one question that ends when ctx is cancelled,
// but not at its deadline.
func beyondDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerTimeout)
	stop := context.AfterFunc(ctx, func() {
		if errors.Is(ctx.Err(), context.Canceled) {
			cancel()
		}
	})
	return rctx, func() { stop(); cancel() }
}

const controllerPath = "/v1/controller/networks"

func networkPath(id string) string { return controllerPath + "/" + url.PathEscape(id) }

func memberPath(id, address string) string {
	return networkPath(id) + "/members/" + url.PathEscape(address)
}

// ControllerNetworks lists the records of the controller's networks.
func (c *Client) ControllerNetworks(ctx context.Context) (Records, error) {
	return call[Records](ctx, c, "GET", controllerPath, nil)
}

// ControllerNetwork returns the record of a network.
func (c *Client) ControllerNetwork(ctx context.Context, id string) (Record, error) {
	return call[Record](ctx, c, "GET", networkPath(id), nil)
}

// CreateNetwork makes a network; patch holds the keys that differ from the
// defaults.
func (c *Client) CreateNetwork(ctx context.Context, patch any) (Record, error) {
	return call[Record](ctx, c, "POST", controllerPath, patch)
}

// SetNetwork changes keys of a network.
func (c *Client) SetNetwork(ctx context.Context, id string, patch any) (Record, error) {
	return call[Record](ctx, c, "POST", networkPath(id), patch)
}

// DeleteNetwork removes a network.
func (c *Client) DeleteNetwork(ctx context.Context, id string) (Record, error) {
	return call[Record](ctx, c, "DELETE", networkPath(id), nil)
}

// Members lists the records of a network's members.
func (c *Client) Members(ctx context.Context, id string) (Records, error) {
	return call[Records](ctx, c, "GET", networkPath(id)+"/members", nil)
}

// Member returns the record of a member, and how it was seen last.
func (c *Client) Member(ctx context.Context, id, address string) (Record, error) {
	return call[Record](ctx, c, "GET", memberPath(id, address), nil)
}

// askMemberEvery is how often WaitMember asks: an answer looks at all peers of the node.
const askMemberEvery = time.Second

// WaitMember waits until a member is online in a network, or ctx ends; its error then
// says what was missing last.
func (c *Client) WaitMember(ctx context.Context, id, address string) (Record, error) {
	for {
		r, err := c.lastMember(ctx, id, address)
		switch {
		case err != nil:
			return r, err
		case r.State == nil:
			return r, fault.Usagef("this process doesn't know who is online: is it an older ztgate?")
		case r.State.Online:
			return r, nil
		}
		select {
		case <-ctx.Done():
			return r, fault.NotReady("member %s of network %s %s", address, id, r.State.Missing())
		case <-time.After(askMemberEvery):
		}
	}
}

// lastMember asks even when ctx is about to reach its deadline, as lastHealth does.
func (c *Client) lastMember(ctx context.Context, id, address string) (Record, error) {
	rctx, cancel := beyondDeadline(ctx)
	defer cancel()
	return c.Member(rctx, id, address)
}

// SetMember changes keys of a member, which need not have asked yet.
func (c *Client) SetMember(ctx context.Context, id, address string, patch any) (Record, error) {
	return call[Record](ctx, c, "POST", memberPath(id, address), patch)
}

// DeleteMember forgets a member.
func (c *Client) DeleteMember(ctx context.Context, id, address string) (Record, error) {
	return call[Record](ctx, c, "DELETE", memberPath(id, address), nil)
}
