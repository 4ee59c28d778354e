package fault

// ExitCode maps an error to the exit code of the process.
func ExitCode(err error) int {
	if err == nil {
		return 0
	}
	switch KindOf(err) {
	case KindUsage:
		return 2
	case KindNotRunning:
		return 3
	case KindNotReady:
		return 4
	default:
		return 1
	}
}
