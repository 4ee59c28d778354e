// Command ztgate is a gateway into ZeroTier networks, a member of them, and the
// tools to host one's own. See `ztgate help`.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"ztgate/router/gateway"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		stop() // a second signal ends the process at once
	}()
	a := &app{in: os.Stdin, out: os.Stdout, errOut: os.Stderr, environ: os.Environ(),
		runGateway: gateway.Run, runMember: gateway.RunMember}
	os.Exit(a.main(ctx, os.Args[1:]))
}
