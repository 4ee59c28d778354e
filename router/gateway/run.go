package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"ztgate/router/config"
)

const stopTimeout = 5 * time.Second

// runAll runs the parts until one fails or ctx ends, and then waits for them, but
// not for ever.
func runAll(ctx context.Context, log *slog.Logger, parts ...func(context.Context) error) error {
	eg, gctx := errgroup.WithContext(ctx)
	for _, p := range parts {
		eg.Go(func() error { return p(gctx) })
	}
	done := make(chan error, 1)
	go func() { done <- eg.Wait() }()
	select {
	case err := <-done:
		return err
	case <-gctx.Done():
	}
	if ctx.Err() != nil {
		log.Info("stopping")
	}
	select {
	case err := <-done:
		return err
	case <-time.After(stopTimeout):
		return errors.Join(ctxError(gctx), fmt.Errorf("stop: some parts still ran after %v", stopTimeout))
	}
}

// ctxError returns why a group ended, unless it was asked to.
func ctxError(ctx context.Context) error {
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// newRegistry returns the process's own registry with the standard collectors.
func newRegistry(cfg *config.Config) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	registerStandard(reg, cfg)
	return reg
}
