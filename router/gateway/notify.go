package gateway

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"ztgate/router/control"
)

// notifier tells the service manager what the process does (sd_notify(3)). Its methods
// do nothing without one, and on nil.
type notifier struct {
	log   *slog.Logger
	every time.Duration // between two signs of life; 0 = none are wanted

	mu   sync.Mutex
	last string    // status
	beat time.Time // of the last sign of life
}

// newNotifier asks the environment for a service manager.
func newNotifier(log *slog.Logger) *notifier {
	n := &notifier{log: log}
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("the service manager's watchdog gets no signs of life", "error", err)
	}
	n.every = watchdog / 4
	return n
}

func (n *notifier) send(lines ...string) {
	if n == nil {
		return
	}
	if _, err := daemon.SdNotify(false, strings.Join(lines, "\n")); err != nil {
		n.log.Warn("tell the service manager", "error", err)
	}
}

// started says that the process serves its API.
func (n *notifier) started() { n.send(daemon.SdNotifyReady) }

// reloading says that the configuration is read again; started ends that.
func (n *notifier) reloading() {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t) // can't fail
	n.send(daemon.SdNotifyReloading, fmt.Sprintf("MONOTONIC_USEC=%d", t.Nano()/1000))
}

func (n *notifier) stopping() { n.send(daemon.SdNotifyStopping) }

// status says what health is, if that is news.
func (n *notifier) status(h control.Health) {
	if n == nil {
		return
	}
	text := "STATUS=" + string(h.State)
	if len(h.Reasons) > 0 {
		text += ": " + strings.Join(strings.Fields(strings.Join(h.Reasons, "; ")), " ")
	}
	n.mu.Lock()
	news := text != n.last
	n.last = text
	n.mu.Unlock()
	if news {
		n.send(text)
	}
}

// alive is a sign of life. Most calls only look at the clock.
func (n *notifier) alive(now time.Time) {
	if n == nil || n.every == 0 {
		return
	}
	n.mu.Lock()
	due := now.Sub(n.beat) >= n.every
	if due {
		n.beat = now
	}
	n.mu.Unlock()
	if due {
		n.send(daemon.SdNotifyWatchdog)
	}
}
