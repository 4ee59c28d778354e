// Package fault has the kinds of failures, which decide the exit code.
package fault

import (
	"errors"
	"fmt"
)

// Kind says what sort of failure an error is; it decides the exit code.
type Kind string

// Kinds of failure.
const (
	KindFailed     Kind = "failed"      // the operation failed
	KindUsage      Kind = "usage"       // wrong usage or configuration
	KindNotRunning Kind = "not_running" // the gateway is not running or not reachable
	KindNotReady   Kind = "not_ready"   // it runs but is not ready
)

// Error is an error of a known kind.
type Error struct {
	Kind Kind
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

func Usagef(format string, args ...any) error {
	return &Error{KindUsage, fmt.Errorf(format, args...)}
}

// Usage marks err as caused by wrong usage or configuration.
func Usage(err error) error {
	if err == nil {
		return nil
	}
	return &Error{KindUsage, err}
}

// NotReady returns an error that says what the gateway waits for.
func NotReady(format string, args ...any) error {
	return &Error{KindNotReady, fmt.Errorf(format, args...)}
}

// KindOf returns the kind of err; [KindFailed] unless it says otherwise.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return KindFailed
}
