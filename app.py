"""Start the page of snell_diffusion on http://127.0.0.1:7860 (`python app.py --help`)."""

from snell_diffusion.app import main

if __name__ == "__main__":
    main()
