package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// Serve runs the control API and the HTTP server of a node and, unless it is nil, a
// forwarding plane that somebody else runs. It sets nothing up in the kernel.
func Serve(ctx context.Context, cfg *config.Config, mode string, log *slog.Logger, node Node, engine *netstack.Engine) error {
	s := newService(cfg, log, node, time.Now())
	s.mode = mode
	reg := newRegistry(cfg)
	parts := []func(context.Context) error{s.targets.Run, func(ctx context.Context) error { return s.follow(ctx, follower{sync: s.judge}) }}
	if engine != nil {
		s.usePlane(engine)
		s.dns = newClientNames(s, s.dial, reg, log)
		parts = append(parts, s.dns.run)
	}
	srv, err := listen(s, reg)
	if err != nil {
		return err
	}
	defer srv.close()
	return runAll(ctx, log, append(parts, srv.run)...)
}

// judge makes a plan by the configuration alone.
func (s *service) judge(nets []ztnode.Network) {
	p := plan.Make(plan.Input{Config: s.config(), Networks: nets, Joined: s.remembered.joined(), Held: s.planned().Held})
	s.usePlan(p, s.config().VPC.TUN, nil)
}

func (s *service) controlHandler() http.Handler {
	mux := http.NewServeMux()
	get := func(pattern string, f func(*http.Request) (any, error)) { mux.HandleFunc(pattern, control.Answer(f)) }
	get("GET /v1/status", func(*http.Request) (any, error) { return s.status(), nil })
	get("GET /v1/info", func(*http.Request) (any, error) { return s.info(), nil })
	get("GET /v1/health", func(*http.Request) (any, error) { return s.health(), nil })
	get("GET /v1/networks", func(*http.Request) (any, error) {
		return control.Networks{Schema: control.Schema, Networks: s.networkViews()}, nil
	})
	get("GET /v1/peers", func(*http.Request) (any, error) { return control.Peers{Schema: control.Schema, Peers: s.peers()}, nil })
	get("GET /v1/config", func(*http.Request) (any, error) {
		return control.Configuration{Schema: control.Schema, Values: s.config().Values(), Warnings: s.config().Warnings}, nil
	})
	get("GET /v1/flows", func(r *http.Request) (any, error) {
		f, err := control.ParseFlowFilter(r.FormValue)
		if err != nil {
			return nil, err
		}
		return s.flows(f)
	})
	get("GET /v1/drops", func(*http.Request) (any, error) { return s.drops() })
	get("POST /v1/networks/{id}", func(r *http.Request) (any, error) { return s.join(r.PathValue("id")) })
	get("DELETE /v1/networks/{id}", func(r *http.Request) (any, error) { return s.leave(r.PathValue("id")) })
	get("POST /v1/reload", func(*http.Request) (any, error) { return s.reloadConfig() })
	get("POST /v1/explain", func(r *http.Request) (any, error) {
		var q control.Question
		if err := control.ReadJSON(r, &q); err != nil {
			return nil, err
		}
		return s.explain(q)
	})
	get("POST /v1/doctor", func(r *http.Request) (any, error) {
		var req control.DiagnosisRequest
		if err := control.ReadJSON(r, &req); err != nil {
			return nil, err
		}
		return s.diagnose(r.Context(), req)
	})
	get("GET /v1/moons", func(*http.Request) (any, error) { return s.moons() })
	get("POST /v1/moons/{id}", func(r *http.Request) (any, error) { return s.orbit(r.PathValue("id"), r.FormValue("seed")) })
	get("DELETE /v1/moons/{id}", func(r *http.Request) (any, error) { return s.deorbit(r.PathValue("id")) })
	get("POST /v1/ping", func(r *http.Request) (any, error) {
		var req control.PingRequest
		if err := control.ReadJSON(r, &req); err != nil {
			return nil, err
		}
		return s.ping(r.Context(), req)
	})
	get("POST /v1/resolve", func(r *http.Request) (any, error) {
		var req control.ResolveRequest
		if err := control.ReadJSON(r, &req); err != nil {
			return nil, err
		}
		return s.resolve(r.Context(), req)
	})
	s.controllerRoutes(get)
	s.localAPI(nil).Register(mux)
	get("/", func(r *http.Request) (any, error) {
		return nil, fault.Usagef("%s %s is not part of the control API of this version", r.Method, r.URL.Path)
	})
	return mux
}

func (s *service) join(text string) (any, error) {
	id, err := ztnode.ParseNetworkID(text)
	if err != nil {
		return nil, fault.Usage(err)
	}
	if s.mode == control.ModeNode {
		return nil, fault.Usagef("this process has no interface to join networks with: run ztgate run or ztgate member")
	}
	if err := s.node.Join(id); errors.Is(err, ztnode.ErrTooManyNetworks) {
		return nil, fault.Usagef("join network %s: %w with ztgate leave NWID", id, err)
	} else if err != nil {
		return nil, fmt.Errorf("join network %s: %w", id, err)
	}
	return control.Networks{Schema: control.Schema, Networks: s.only(id)}, s.remembered.join(id, true)
}

func (s *service) only(id ztnode.NetworkID) []control.NetworkView {
	out := []control.NetworkView{}
	for _, n := range s.networkViews() {
		if n.ID == id {
			out = append(out, n)
		}
	}
	return out
}

func (s *service) leave(text string) (any, error) {
	id, err := ztnode.ParseNetworkID(text)
	if err != nil {
		return nil, fault.Usage(err)
	}
	if cfg := s.config(); slices.Contains(cfg.NetworkIDs(), id) { // the next reload or start would join it again
		then := "restart"
		if s.reload != nil && strings.HasPrefix(cfg.Origin("networks"), "file ") {
			then = "run ztgate reload"
		}
		return nil, fault.Usagef("network %s is configured (networks, from %s): remove it there and %s", id, cfg.Origin("networks"), then)
	}
	left := s.only(id)
	if len(left) == 0 && !slices.Contains(s.node.leftOut(), id) {
		return nil, s.notJoined(id)
	}
	if err := s.node.Leave(id); err != nil {
		return nil, fmt.Errorf("leave network %s: %w", id, err)
	}
	return control.Networks{Schema: control.Schema, Networks: left}, s.remembered.join(id, false)
}

// notJoined refuses to leave a network, and names the one that was meant.
func (s *service) notJoined(id ztnode.NetworkID) error {
	var known []string
	for _, n := range s.networks() {
		known = append(known, n.ID.String())
	}
	switch near := config.Nearest(id.String(), known); {
	case near != "":
		return fault.Usagef("network %s isn't joined: did you mean %s?", id, near)
	case len(known) == 0:
		return fault.Usagef("network %s isn't joined, and no other one is", id)
	}
	return fault.Usagef("network %s isn't joined: see ztgate networks", id)
}
